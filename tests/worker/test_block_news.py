"""A worker tells the router its blocks when asked: the whole set, then changes, and a gap where it could not."""

from __future__ import annotations

import asyncio

import pytest

from disagg.cache.identity import BlockHasher, token_bytes
from disagg.cache.journal import BlockJournal
from disagg.cache.prefix import PrefixNode, PrefixTree
from disagg.transceiver.wire.messages.blocks import MAX_EVENTS, AskBlocks, BlockEvents
from disagg.worker import block_news
from disagg.worker.block_news import MAX_MESSAGES, BlockNews

T = 2


class Told:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_nodes: int, max_waiting: int = 10**6) -> None:
        monkeypatch.setattr(block_news, "TELL_S", 0.0)
        tree = PrefixTree(BlockHasher(b"key", "model"), 1)
        root = tree.root("")
        assert root is not None
        self.nodes: list[PrefixNode] = tree.extend(root, [token_bytes([n, n]) for n in range(num_nodes)])
        self.journal = BlockJournal(tree, max_waiting)
        self.messages: list[BlockEvents] = []
        self.news = BlockNews(self.journal, "w", T, self.messages.append, lambda call: call())

    def look(self) -> list[BlockEvents]:
        """What is told by the time the loop has nothing to do."""
        asyncio.run(self._run())
        said, self.messages[:] = list(self.messages), []
        return said

    async def _run(self) -> None:
        await self.news._tell()


def test_nothing_is_told_before_the_router_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 3)
    told.journal.store({told.nodes[0]: [0]})
    assert told.look() == []


def test_the_whole_set_comes_first_and_each_message_has_the_next_number(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 3)
    told.nodes[0].slots = [1]
    told.news.ask(AskBlocks("w"))
    (first,) = told.look()
    assert (first.sequence, first.is_reset, first.identities, first.tokens) == (0, True, told.nodes[0].identity, b"")
    assert told.look() == [], "what is no news is not told"
    told.journal.store({told.nodes[1]: [0]})
    (second,) = told.look()
    assert (second.sequence, second.is_reset, second.parents) == (1, False, told.nodes[0].identity)


def test_an_empty_cache_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 1)
    told.news.ask(AskBlocks("w"))
    (only,) = told.look()
    assert (only.is_reset, only.ops) == (True, b"")


def test_token_ids_go_along_where_the_router_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 2)
    for slot, node in enumerate(told.nodes):
        node.slots = [slot]
    told.news.ask(AskBlocks("w", tokens=True))
    (only,) = told.look()
    assert only.tokens == b"".join(number.to_bytes(4, "little") for number in (0, 0, 1, 1))


def test_many_events_go_in_messages_of_a_bounded_size_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 3)
    told.news.ask(AskBlocks("w"))
    for _ in range(MAX_MESSAGES + 1):
        for _ in range(MAX_EVENTS):
            told.journal.drop(b"n" * 16, [0])
    first = told.look()
    assert [message.sequence for message in first] == list(range(MAX_MESSAGES))
    assert max(len(message.ops) for message in first) == MAX_EVENTS
    assert [message.sequence for message in told.look()] == [MAX_MESSAGES, MAX_MESSAGES + 1]


def test_lost_events_are_told_as_one_gap_at_which_the_router_asks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch, 3, max_waiting=2)
    told.news.ask(AskBlocks("w"))
    assert [message.sequence for message in told.look()] == [0]
    for _ in range(3):
        told.journal.drop(b"n" * 16, [0])
    (gap,) = told.look()
    assert (gap.sequence, gap.ops, gap.is_reset) == (2, b"", False), "1 is missing"
    assert told.look() == []
    told.news.ask(AskBlocks("w"))
    assert [(message.sequence, message.is_reset) for message in told.look()] == [(3, True)]
