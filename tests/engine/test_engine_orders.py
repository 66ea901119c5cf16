"""Order of resources: pools for one request and a half, two prefill and two decode engines, any order."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.cache.admission import peak_slots
from disagg.engine.commands import (
    Decode,
    DropSoft,
    FailedEvent,
    FinishedEvent,
    Pin,
    PinnedEvent,
    Prefill,
    Release,
    Reserve,
    Serve,
)

torch.set_num_threads(1)

LONGEST, BATCHED = 28, 8


def room_for(share):
    peaks = peak_slots(LAYOUT, total_tokens=LONGEST, history=0, step_tokens=BATCHED)
    return tuple(int(peak * share) + 2 for peak in peaks)


class Flow:
    """One request on its way through a prefill and a decode engine: which of its next moves are possible now."""

    def __init__(self, number, length, max_tokens, source, target, stem=None):
        prompt = prompt_of(length, number if stem is None else stem)
        self.key, self.prompt, self.sampling = key(number), prompt, greedy(max_tokens)
        self.source, self.target, self.retried = source, target, False
        self.todo = {"prefill", "reserve"}

    @property
    def is_done(self):
        return not self.todo

    def moves(self):
        """Messages of the transfer that could arrive now; each is one a worker would send in this state."""
        possible = [move for move in ("prefill", "reserve", "cancel", "drop soft") if move in self.todo]
        if "pin" in self.todo and self.target.reserved(self.key) and "prefill" not in self.todo:
            possible.append("pin")  # a FETCH follows a reservation
        pinned = self.source.of(self.key, PinnedEvent)
        if "decode" in self.todo and pinned and self.source.computed(self.key):
            possible.append("decode")
        if "finish" in self.todo and self.target.of(self.key, (FinishedEvent, FailedEvent)):
            possible.append("finish")
        return possible

    def take(self, move):
        self.todo.discard(move)
        getattr(self, "_" + move.replace(" ", "_"))()

    def _prefill(self):
        self.source.handle(Prefill(self.key, self.prompt, self.sampling))

    def _reserve(self):
        self.target.handle(Reserve(self.key, self.prompt, self.sampling))
        self.todo.add("pin")

    def _drop_soft(self):
        self.source.handle(DropSoft(self.key))

    def _pin(self):
        self.source.handle(Pin(self.key))
        self.todo.add("decode")

    def _decode(self):
        verified = transfer(self.source, self.target, self.key, len(self.prompt))
        self.source.handle(Release(self.key))
        self.target.handle(Decode(self.key, verified))
        self.todo = {"finish"}

    def _finish(self):
        assert isinstance(self.target.ending(self.key), FinishedEvent)
        assert self.target.tokens(self.key) == reference_tokens(LAYOUT, self.prompt, self.sampling)

    def _cancel(self):
        """The router gives up this attempt, or lets decode prefill it from here: all it holds goes first."""
        self.source.handle(Release(self.key))
        self.target.handle(Release(self.key))
        self.todo = set()

    def fall_back(self):
        self._cancel()
        self.key = key(int(self.key.transfer_id, 16), 2)
        self.target.handle(Serve(self.key, self.prompt, self.sampling, urgent=True))
        self.todo = {"finish"}


def run_system(flows, engines, choose):
    """Take possible moves and engine steps in the order `choose` picks until none is left; every request must end."""
    for _ in range(20_000):
        moves = [(flow.take, move) for flow in flows for move in flow.moves()]
        moves += [(engine.step, None) for engine in engines if engine.has_work]
        if not moves:
            break
        act, argument = choose(moves)
        act(argument) if argument else act()
    assert all(flow.is_done for flow in flows), "a request hangs"
    for engine in engines:
        assert engine.num_used == 0
        assert not engine.stats().live_keys


def system(share=1.5, max_num_seqs=4, hasher=None, steps_ahead=None):
    limits = {"num_slots": room_for(share), "max_num_seqs": max_num_seqs, "max_num_batched_tokens": BATCHED}
    limits |= {"hasher": hasher, "steps_ahead": steps_ahead}
    sources = [TestedEngine(role="prefill", **limits) for _ in range(2)]
    return sources, [TestedEngine(role="decode", **limits) for _ in range(2)]


REQUESTS = st.lists(
    st.tuples(st.integers(1, 22), st.integers(1, 6), st.integers(0, 1), st.integers(0, 1), st.booleans()),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=40)
@given(REQUESTS, st.randoms(use_true_random=False), st.sampled_from([1.0, 1.5]), st.sampled_from([None, 1]))
def test_every_order_of_messages_and_steps_ends_with_small_pools(requests, randomness, share, steps_ahead):
    sources, targets = system(share, steps_ahead=steps_ahead)
    flows = [
        Flow(number, length, max_tokens, sources[source], targets[target])
        for number, (length, max_tokens, source, target, _) in enumerate(requests)
    ]
    for flow, (*_, drops) in zip(flows, requests, strict=True):
        flow.todo |= {"drop soft"} if drops else set()
    run_system(flows, [*sources, *targets], randomness.choice)


@settings(deadline=None, max_examples=30)
@given(REQUESTS, st.randoms(use_true_random=False))
def test_cancels_at_any_moment_leave_nothing_behind(requests, randomness):
    sources, targets = system()
    flows = [
        Flow(number, length, max_tokens, sources[source], targets[target])
        for number, (length, max_tokens, source, target, _) in enumerate(requests)
    ]
    for flow, (*_, cancels) in zip(flows, requests, strict=True):
        flow.todo |= {"cancel"} if cancels else set()
    run_system(flows, [*sources, *targets], randomness.choice)


@settings(deadline=None, max_examples=30)
@given(REQUESTS, st.randoms(use_true_random=False), st.sampled_from([1.0, 1.5]), st.sampled_from([None, 1]))
def test_requests_that_begin_alike_share_blocks_in_any_order_and_answer_the_same(
    requests, randomness, share, steps_ahead
):
    sources, targets = system(share, hasher=HASHER, steps_ahead=steps_ahead)
    flows = [
        Flow(number, length, max_tokens, sources[source], targets[target], stem=number % 2)
        for number, (length, max_tokens, source, target, _) in enumerate(requests)
    ]
    for flow, (*_, cancels) in zip(flows, requests, strict=True):
        flow.todo |= {"cancel"} if cancels else {"drop soft"}
    run_system(flows, [*sources, *targets], randomness.choice)


@pytest.mark.parametrize("seed", range(3))
def test_falling_back_to_decode_ends_too(seed):
    randomness = random.Random(seed)
    sources, targets = system()
    flows = [Flow(n, 6 + n, 4, sources[n % 2], targets[n // 2 % 2]) for n in range(12)]
    engines = [*sources, *targets]

    def choose(moves):
        if randomness.random() < 0.05 and (waiting := [f for f in flows if "finish" not in f.todo and not f.is_done]):
            randomness.choice(waiting).fall_back()
            return (lambda: None, None)
        return randomness.choice(moves)

    run_system(flows, engines, choose)


@pytest.mark.parametrize("seed", range(2))
def test_two_hundred_requests_over_two_by_two_engines_end(seed):
    randomness = random.Random(seed)
    sources, targets = system()
    flows = [
        Flow(
            n,
            randomness.randint(1, 22),
            randomness.randint(1, 4),
            randomness.choice(sources),
            randomness.choice(targets),
        )
        for n in range(200)
    ]
    for flow in flows:
        flow.todo |= {"cancel"} if randomness.random() < 1 / 3 else set()
    run_system(flows, [*sources, *targets], lambda moves: moves[randomness.randrange(len(moves))])


def test_prefill_reserving_before_decode_would_hang():
    """Negative control: pinned without any reservation, two requests hold what the other waits for."""
    sources, targets = system(share=1.0)
    first, second = Flow(0, 22, 4, sources[0], targets[0]), Flow(1, 22, 4, sources[0], targets[0])
    sources[0].handle(Prefill(first.key, first.prompt, first.sampling))
    sources[0].handle(Pin(first.key))
    second.take("reserve")
    second.take("prefill")
    second.take("pin")
    first.take("reserve")
    first.todo = {"decode"}
    for engine in (*sources, *targets):
        engine.run()
    assert targets[0].reserved(first.key) is None
    assert sources[0].of(second.key, PinnedEvent) == []
