"""The index process names who holds a prompt; the router goes on without it, and starts it again."""

from __future__ import annotations

import os
import signal
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.cluster.router_harness import GEOMETRY, make_register
from support.event_loop import PATIENCE_S, in_event_loop, until

from disagg.cache.identity import BlockHasher, token_bytes
from disagg.cache.journal import BlockStored, JournalRestart
from disagg.router.index import remote
from disagg.router.index.frames import (
    ADDED,
    EVENTS,
    FIGURES,
    GONE,
    HOLDERS,
    MISSED,
    QUESTION,
    SETTINGS,
    FrameBuffer,
    events_frame,
    frame,
    values_of,
)
from disagg.router.index.process import IndexServer
from disagg.router.index.remote import PrefixIndex
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.router import Register
from disagg.worker.block_news import events_message

KEY, MODEL, T = b"k" * 32, "f" * 32, GEOMETRY.block_size
PROMPT = tuple(range(100, 100 + 4 * T + 3))


def told(worker: str, tokens: Sequence[int], num_blocks: int, *, salt: str = "", sequence: int = 0) -> BlockEvents:
    """A worker's whole set: the first blocks of these tokens, in both groups of the geometry."""
    hasher = BlockHasher(KEY, MODEL)
    events, parent = [], hasher.root(salt)
    for number in range(num_blocks):
        block = token_bytes(tokens[number * T : (number + 1) * T])
        identity = hasher.child(parent, block)
        events.append(BlockStored(identity, (0, 1), parent if number else b"", block))
        parent = identity
    return events_message(worker, sequence, T, [JournalRestart(), *events])


def asked(server: IndexServer, kind: bytes, *values: object) -> list[tuple[bytes, tuple[object, ...]]]:
    answers = server.handle(kind, values_of(frame(kind, *values)[5:]))
    return [(k, values_of(payload)) for answer in answers for k, payload in FrameBuffer().feed(answer)]


def server_of(*workers: str) -> IndexServer:
    server = IndexServer()
    asked(server, SETTINGS, KEY, MODEL, [(None, 0), (64, 0)])
    for worker in workers:
        asked(server, ADDED, worker, T, worker, "CPU")
    return server


def holders(server: IndexServer, prompt: Sequence[int], salt: str = "") -> dict[str, int]:
    ((kind, (number, found)),) = asked(server, QUESTION, 7, salt, 4, array("i", prompt).tobytes())
    assert (kind, number) == (HOLDERS, 7)
    return dict(found)  # type: ignore[call-overload, no-any-return]


def take(server: IndexServer, events: BlockEvents) -> list[tuple[bytes, tuple[object, ...]]]:
    ((kind, payload),) = FrameBuffer().feed(events_frame(events))
    return asked(server, kind, *values_of(payload))


def test_holders_are_found_by_the_identities_that_workers_give_their_blocks() -> None:
    server = server_of("a", "b", "c")
    assert take(server, told("a", PROMPT, 2)) == take(server, told("b", PROMPT, 4)) == []
    take(server, told("c", PROMPT, 4, salt="tenant"))
    assert holders(server, PROMPT) == {"b": 4 * T, "a": 2 * T}
    assert holders(server, PROMPT, "tenant") == {"c": 4 * T}
    assert holders(server, PROMPT[: 2 * T]) == {"b": T, "a": T}, "the last token is computed in any case"
    assert holders(server, [1, *PROMPT[1:]]) == holders(server, PROMPT[:T]) == {}


def test_a_missed_message_is_told_and_a_worker_that_is_gone_holds_nothing() -> None:
    server = server_of("a", "b")
    take(server, told("a", PROMPT, 1))
    take(server, told("b", PROMPT, 1))
    assert take(server, events_message("a", 2, T, [])) == [(MISSED, ("a",))]
    assert holders(server, PROMPT) == {"b": T}
    asked(server, GONE, "b")
    assert holders(server, PROMPT) == {}
    while server.sweep():
        pass
    ((_, (num_blocks, cpu_s, nbytes)),) = asked(server, FIGURES)
    assert num_blocks == 0
    assert cpu_s > 0  # type: ignore[operator]
    assert nbytes > 1 << 20  # type: ignore[operator]


def test_before_the_first_worker_is_known_nothing_is_held() -> None:
    server = IndexServer()
    assert holders(server, PROMPT) == {}
    assert asked(server, EVENTS, *("a", 0, T, [], b"", b"", b"", b"", True)) == []
    assert not server.sweep()


def test_frames_come_whole_however_the_bytes_are_cut() -> None:
    data = frame(GONE, "a") + frame(FIGURES) + frame(GONE, "b" * 300)
    buffer = FrameBuffer()
    found = [kind for byte in data for kind, _ in buffer.feed(bytes([byte]))]
    assert found == [GONE, FIGURES, GONE]
    assert [kind for kind, _ in FrameBuffer().feed(data)] == found


# --- with the process -------------------------------------------------------------------------------------------


async def answers(index: PrefixIndex, expected: dict[str, int]) -> None:
    """Asked until it is so: the process takes what it was told in its own time."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := await index.who_holds(PROMPT, "")) != expected:
        assert time.monotonic() < deadline, found


def register(name: str) -> Register:
    return replace(make_register(name, "prefill"), tells_blocks=True)


@pytest.mark.processes
@in_event_loop
async def test_the_process_answers_and_after_a_kill_is_started_and_told_anew() -> None:
    asks: list[tuple[str, AskBlocks]] = []
    async with PrefixIndex.open(KEY, lambda name, message: asks.append((name, message))) as index:
        assert await index.who_holds(PROMPT, "") == {}, "before it runs no request waits for it"
        for name in ("a", "b"):
            index.add(register(name))
        index.add(make_register("old", "prefill"))
        await until(lambda: len(asks) == 2, "the process started")
        assert [name for name, _ in asks] == ["a", "b"], "a worker that tells no blocks is not asked"
        index.take(told("a", PROMPT, 3))
        index.take(told("b", PROMPT, 1))
        await answers(index, {"a": 3 * T, "b": T})
        index.take(told("a", PROMPT, 2, sequence=5))
        await answers(index, {"a": 2 * T, "b": T})
        index.take(events_message("a", 9, T, []))
        await answers(index, {"b": T})
        assert asks[2:] == [("a", AskBlocks("a"))], "after a gap it is asked for all"
        del asks[:]
        assert index._process is not None
        os.kill(index._process.pid, signal.SIGKILL)
        await until(lambda: len(asks) == 2, "the process was started again")
        index.take(told("b", PROMPT, 1, sequence=7))
        await answers(index, {"b": T})
        index.remove("b")
        await answers(index, {})
        assert index.num_starts == 2


@pytest.mark.processes
@in_event_loop
async def test_a_process_that_does_not_answer_costs_its_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 0.02)
    async with PrefixIndex.open(KEY, lambda name, message: None) as index:
        index.add(register("a"))
        await until(lambda: index._process is not None, "the process started")
        assert index._process is not None
        os.kill(index._process.pid, signal.SIGSTOP)
        assert await index.who_holds(PROMPT, "") == {}
        assert index.num_unanswered == 1
