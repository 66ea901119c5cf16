"""Tokens wait for the router's credit: merged, in order, bounded by holding the engine, and none is lost."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.unchecked import raw

from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.messages.router import (
    Finished,
    Lease,
    RequestFailed,
)
from disagg.transceiver.wire.messages.tokens import StepTokens, Tokens
from disagg.transceiver.wire.messages.values import TokenLogprobs
from disagg.worker.token_outbox import MAX_NUMBERS, MAX_WAITING, TokenOutbox


class Outbox:
    """An outbox with what it sent and whether the engine is held."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.holds: list[bool] = []
        self.of = TokenOutbox(self.sent.append, self.holds.append)

    @property
    def steps(self) -> list[StepTokens]:
        return [message for message in self.sent if isinstance(message, StepTokens)]


def row(transfer_id: str, index: int, *token_ids: int) -> Tokens:
    return Tokens(transfer_id, 1, index, token_ids)


def test_the_tokens_of_one_turn_leave_in_one_message() -> None:
    outbox = Outbox()
    outbox.of.allow(1)
    assert outbox.of.add(row("a", 0, 5)), "the first of a turn asks for a flush"
    assert not outbox.of.add(row("b", 3, 6))
    outbox.of.flush()
    assert [list(step.rows()) for step in outbox.steps] == [[row("a", 0, 5), row("b", 3, 6)]]


def test_without_credit_tokens_wait_and_leave_joined_when_it_comes() -> None:
    outbox = Outbox()
    for index in range(10):
        outbox.of.add(row("a", index, index))
        outbox.of.flush()
    assert outbox.of.follow(Finished("a", 1, 10, "length"))
    assert not outbox.of.follow(Lease("me", "router")), "a lease waits for nothing"
    assert outbox.sent == []
    outbox.of.allow(1)
    assert [list(step.rows()) for step in outbox.steps] == [[row("a", 0, *range(10))]]
    assert outbox.sent[1:] == [Finished("a", 1, 10, "length")]


def test_the_engine_is_held_past_the_bound_until_half_of_it_has_left() -> None:
    outbox = Outbox()
    outbox.of.add(row("a", 0, *range(MAX_WAITING)))
    assert outbox.holds == []
    outbox.of.add(row("a", MAX_WAITING, 1))
    assert outbox.holds == [True]
    for limit in range(1, 2 + (MAX_WAITING + 1) // MAX_NUMBERS):
        outbox.of.allow(limit)
    assert outbox.holds == [True, False]
    assert outbox.of.num_waiting == 0


def test_a_registration_that_ends_holds_the_engine_no_longer() -> None:
    outbox = Outbox()
    outbox.of.add(row("a", 0, *range(MAX_WAITING + 1)))
    outbox.of.close()
    assert outbox.holds == [True, False]


@pytest.mark.parametrize(
    "tokens",
    [
        row("a", 0, 2**40),
        row("a", 0, -1),
        Tokens("a", 1, 0, (1,), (raw(TokenLogprobs, 0.0, ((2**40, 0.0),)),)),
        Tokens("a", 1, 0, (1, 2), (TokenLogprobs(0.0),)),
    ],
)
def test_what_no_array_can_hold_costs_its_own_attempt(tokens: Tokens) -> None:
    outbox = Outbox()
    outbox.of.allow(9)
    outbox.of.add(row("b", 0, 7))
    outbox.of.add(tokens)
    outbox.of.flush()
    assert [list(step.rows()) for step in outbox.steps] == [[row("b", 0, 7)]]
    (failed,) = [message for message in outbox.sent if isinstance(message, RequestFailed)]
    assert (failed.transfer_id, failed.status) == ("a", 500)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("tokens"), st.sampled_from("abcd"), st.integers(1, 5), st.booleans()),
        st.tuples(st.just("finish"), st.sampled_from("abcd")),
        st.tuples(st.just("credit"), st.integers(0, 3)),
        st.tuples(st.just("turn")),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_whatever_the_credit_every_attempt_is_told_whole_in_order_and_within_the_limit(script: list[Any]) -> None:
    outbox, limit = Outbox(), 0
    said: dict[str, list[int]] = defaultdict(list)
    ended: set[str] = set()
    for kind, *args in script:
        if kind == "tokens" and args[0] not in ended:
            name, count, with_logprobs = args
            ids = tuple(range(len(said[name]), len(said[name]) + count))
            logprobs = tuple(TokenLogprobs(-float(i), ((i, -0.5),)) for i in ids) if with_logprobs else ()
            outbox.of.add(Tokens(name, 1, len(said[name]), ids, logprobs))
            said[name].extend(ids)
        elif kind == "finish" and args[0] not in ended:
            ended.add(args[0])
            message = Finished(args[0], 1, len(said[args[0]]), "length")
            if not outbox.of.follow(message):
                outbox.sent.append(message)
        elif kind == "credit":
            limit += args[0]
            outbox.of.allow(limit)
        elif kind == "turn":
            outbox.of.flush()
        assert len(outbox.steps) <= limit
    outbox.of.allow(limit + 1)
    heard: dict[str, list[int]] = defaultdict(list)
    for message in outbox.sent:
        if isinstance(message, Finished):
            assert len(heard[message.transfer_id]) == message.index, "the end overtook tokens"
            continue
        for tokens in decode(encode(message)).rows():
            assert tokens.index == len(heard[tokens.transfer_id])
            assert all(
                int(-found.logprob) == id_ for found, id_ in zip(tokens.logprobs, tokens.token_ids, strict=False)
            )
            heard[tokens.transfer_id].extend(tokens.token_ids)
    assert {name: ids for name, ids in heard.items() if ids} == {name: ids for name, ids in said.items() if ids}


def test_what_an_attempt_says_under_its_next_epoch_stays_behind_what_it_said_under_the_last() -> None:
    """A move that failed gives an answer another epoch, while its tokens wait for credit."""
    outbox = Outbox()
    outbox.of.add(row("a", 0, *range(MAX_NUMBERS)))
    outbox.of.add(row("a", MAX_NUMBERS, 1, 2))
    outbox.of.add(Tokens("a", 3, MAX_NUMBERS + 2, (3,)))
    assert outbox.of.follow(Finished("a" * 32, 3, MAX_NUMBERS + 3, "stop")) is False, "another request's"
    for limit in (1, 2, 3):
        outbox.of.allow(limit)
    rows = [told for step in outbox.steps for told in step.rows()]
    assert [(told.epoch, told.index) for told in rows] == [(1, 0), (1, MAX_NUMBERS), (3, MAX_NUMBERS + 2)]
