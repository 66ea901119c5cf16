"""Two workers that do both, each computing for the other, with nearly full pools: neither waits for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.engine.commands import Decode, Pin, PinnedEvent, Prefill, Release, Reserve, Serve

LONGEST = 48
"""`max_model_len` here."""
TIGHT = (18, 46)
"""Slots per pool: twice a longest prompt's peak, and two more."""
NUM_REQUESTS = 12


@dataclass
class Crossing:
    """Requests from both sides, moved by hand: each is decoded on one engine and computed on the other."""

    seed: int
    num_slots: tuple[int, int] = TIGHT
    max_num_seqs: int = 4
    engines: tuple[TestedEngine, TestedEngine] = field(init=False)
    sides: dict[int, int] = field(default_factory=dict)
    """By request, the engine that answers it."""
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        sizes = {"max_num_seqs": self.max_num_seqs, "max_model_len": LONGEST}
        self.engines = tuple(TestedEngine(num_slots=self.num_slots, **sizes) for _ in range(2))  # type: ignore[assignment, arg-type]

    def prompt(self, number: int) -> tuple[int, ...]:
        return prompt_of(30 + number % 10, number)

    def begin(self, number: int) -> None:
        side = self.sides[number] = number % 2
        asked = greedy(4, ignore_eos=True)
        self.engines[side].handle(Reserve(key(number), self.prompt(number), asked))
        self.engines[1 - side].handle(Prefill(key(number), self.prompt(number), asked))

    def turn(self) -> bool:
        """Whatever can happen, in random order; whether anything did."""
        moves = [*self._fetches(), *self._handovers(), *self._steps()]
        self.rng.shuffle(moves)
        return any(move() for move in moves)

    def _fetches(self) -> Iterator:
        for number, side in self.sides.items():
            source = self.engines[1 - side]
            is_reserved = self.engines[side].reserved(key(number)) is not None
            if is_reserved and not getattr(self, f"pinned{number}", False):

                def fetch(number: int = number, source: TestedEngine = source) -> bool:
                    setattr(self, f"pinned{number}", True)
                    source.handle(Pin(key(number)))
                    return True

                yield fetch

    def _handovers(self) -> Iterator:
        for number, side in self.sides.items():
            sink, source = self.engines[side], self.engines[1 - side]
            is_pinned = bool(source.of(key(number), PinnedEvent))
            if number not in self.done and is_pinned and source.computed(key(number)) is not None:

                def hand_over(number: int = number, sink: TestedEngine = sink, source: TestedEngine = source) -> bool:
                    verified = transfer(source, sink, key(number), len(self.prompt(number)))
                    self.done.add(number)
                    sink.handle(Decode(key(number), verified))
                    source.handle(Release(key(number)))
                    return True

                yield hand_over

    def _steps(self) -> Iterator:
        for engine in self.engines:
            if engine.has_work:
                yield lambda engine=engine: engine.step() is not None

    def run(self) -> None:
        while self.turn():
            pass

    def check(self) -> None:
        for number, side in self.sides.items():
            expected = reference_tokens(LAYOUT, self.prompt(number), greedy(4, ignore_eos=True))
            assert self.engines[side].tokens(key(number)) == expected, number
        assert all(engine.num_used == 0 for engine in self.engines)


def crossing(seed: int, **options: object) -> Crossing:
    c = Crossing(seed, **options)  # type: ignore[arg-type]
    for number in range(NUM_REQUESTS):
        c.begin(number)
    return c


@given(st.integers(0, 2**32))
@settings(max_examples=12)
def test_crossing_prompts_in_nearly_full_pools_never_hang(seed: int) -> None:
    c = crossing(seed)
    assert all(engine.stats().has_floor for engine in c.engines)
    c.run()
    c.check()


@given(st.integers(0, 2**32))
@settings(max_examples=6)
def test_own_requests_beside_them_do_not_make_them_hang(seed: int) -> None:
    c = crossing(seed)
    asked = greedy(5, ignore_eos=True)
    for number in range(100, 106):
        c.engines[number % 2].handle(Serve(key(number), prompt_of(35, number), asked, urgent=number > 103))
    c.run()
    c.check()
    for number in range(100, 106):
        assert c.engines[number % 2].tokens(key(number)) == reference_tokens(LAYOUT, prompt_of(35, number), asked)


def test_without_a_floor_they_wait_for_each_other_for_ever() -> None:
    """The control: reservations of both take all the room, and each waits for a prompt that has none."""
    c = crossing(1)
    for engine in c.engines:
        engine._scheduler._promises.floor = (0, 0)
    c.run()
    assert not all(c.engines[side].tokens(key(number)) for number, side in c.sides.items())
    assert any(engine.stats().num_reserved for engine in c.engines)


def test_a_worker_that_hands_nothing_over_keeps_no_floor() -> None:
    engine = TestedEngine(num_slots=TIGHT, max_model_len=LONGEST)
    engine.serve_all([Serve(key(1), prompt_of(30), greedy(3, ignore_eos=True))])
    assert not engine.stats().has_floor


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_one_end_only_keeps_no_floor(role: str) -> None:
    engine = TestedEngine(num_slots=TIGHT, max_model_len=LONGEST, role=role)
    order = Prefill if role == "prefill" else Reserve
    engine.handle(order(key(1), prompt_of(30), greedy(3)))  # type: ignore[arg-type]
    assert not engine.stats().has_floor


def test_pools_that_hold_no_longest_request_beside_it_have_no_floor() -> None:
    engine = TestedEngine(num_slots=(20, 30), max_model_len=LONGEST)
    engine.handle(Reserve(key(1), prompt_of(30), greedy(3)))
    assert not engine.stats().has_floor


def test_the_floor_is_free_while_reservations_want_more() -> None:
    engine = TestedEngine(num_slots=TIGHT, max_model_len=LONGEST, max_num_seqs=8)
    for number in range(8):
        engine.handle(Reserve(key(number), prompt_of(40, number), greedy(4)))
    promises = engine._scheduler._promises
    free = [usable - taken for usable, taken in zip(promises.usable, promises.promised, strict=True)]
    assert all(left >= kept for left, kept in zip(free, promises.floor, strict=True))
    assert any(promises.promised)
    engine.handle(Prefill(key(20), prompt_of(LONGEST - 4, 20), greedy(4)))
    engine.handle(Pin(key(20)))
    assert engine.of(key(20), PinnedEvent)
