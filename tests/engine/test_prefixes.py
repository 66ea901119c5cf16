"""Cached blocks go from engine to engine: lent by one, begun with by the other, and given up at any moment."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, ROOM, TestedEngine, greedy, key, prompt_of
from support.model.fake_runner import reference_tokens
from support.oracles.cache_oracle import needed_blocks

from disagg.engine.commands import (
    DropSoft,
    LendPrefix,
    MakePrefixRoom,
    Pin,
    Prefill,
    PrefixEvictedEvent,
    PrefixGivenUp,
    PrefixLanded,
    PrefixLentEvent,
    PrefixRoomEvent,
    PrefixWantedEvent,
    RegisteredEvent,
    Release,
    Serve,
    SuspectEvent,
    UnitsFinalEvent,
    Unregister,
)
from disagg.transceiver.wire.messages.values import GroupRuns, UnitName

SIZE = LAYOUT.block_size
FIRST_PROMPT = prompt_of(22, 1)
LEG = key(99)
FULL = next(number for number, group in enumerate(LAYOUT.groups) if group.window is None)


def engine(num_slots: tuple[int, int] = ROOM, **options: object) -> TestedEngine:
    return TestedEngine(num_slots=num_slots, hasher=HASHER, **options)  # type: ignore[arg-type]


def after_a_turn(source: TestedEngine, max_tokens: int = 9, number: int = 1) -> tuple[int, ...]:
    """The source answers the first prompt; what the client has then."""
    source.serve_all([Serve(key(number), FIRST_PROMPT, greedy(max_tokens, ignore_eos=True))])
    return (*FIRST_PROMPT, *source.tokens(key(number)))


def boundary_of(tokens: tuple[int, ...]) -> int:
    return (len(tokens) - 1) // SIZE * SIZE


@dataclass
class Fetch:
    """One prompt of the sink that begins with blocks of the source, step by step."""

    source: TestedEngine
    sink: TestedEngine
    prompt: tuple[int, ...]
    number: int = 2
    boundary: int = 0
    salt: str = ""
    lent: PrefixLentEvent = field(init=False)
    room: PrefixRoomEvent = field(init=False)

    @property
    def key(self):
        return key(self.number)

    def begin(self, *, serves: bool = True, **sampling: object) -> PrefixWantedEvent | None:
        asked = greedy(3, ignore_eos=True, **sampling)
        boundary = self.boundary or boundary_of(self.prompt)
        order = Serve if serves else Prefill
        self.sink.handle(order(self.key, self.prompt, asked, prefix_boundary=boundary))
        wanted = self.sink.of(self.key, PrefixWantedEvent)
        return wanted[0] if wanted else None  # type: ignore[return-value]

    def lend(self, held: tuple[GroupRuns, ...] = ()) -> PrefixLentEvent:
        boundary = self.boundary or boundary_of(self.prompt)
        self.source.handle(LendPrefix(LEG, self.prompt[:boundary], self.salt, held, SIZE))
        (self.lent,) = self.source.of(LEG, PrefixLentEvent)  # type: ignore[misc]
        return self.lent

    def make_room(self) -> PrefixRoomEvent:
        self.sink.handle(MakePrefixRoom(self.key, self.lent.boundary))
        (self.room,) = self.sink.of(self.key, PrefixRoomEvent)  # type: ignore[misc]
        return self.room

    def copy(self) -> None:
        """What a transfer does: exactly the lent units, to exactly the slots that wait for them."""
        assert self.room.slots is not None
        slots = {(group, ordinal): slot for group, pairs in enumerate(self.room.slots) for ordinal, slot in pairs}
        assert slots.keys() == {(unit.group, unit.ordinal) for unit in self.lent.units}
        for unit in self.lent.units:
            destination = self.sink.cache.group_view(unit.group)[slots[unit.group, unit.ordinal]]
            destination.copy_(self.source.cache.group_view(unit.group)[unit.slot])

    def land(self) -> None:
        self.copy()
        self.sink.handle(PrefixLanded(self.key))
        self.source.handle(Release(LEG))

    def whole(self, **sampling: object) -> int:
        """All of it; prompt tokens that the sink computed."""
        before = self.sink.stats().prompt_tokens_computed
        wanted = self.begin(**sampling)
        assert wanted is not None
        self.lend(wanted.held)
        self.make_room()
        self.land()
        self.sink.run()
        self.check()
        return self.sink.stats().prompt_tokens_computed - before

    def check(self) -> None:
        asked = greedy(3, ignore_eos=True)
        assert self.sink.tokens(self.key) == reference_tokens(LAYOUT, self.prompt, asked)
        assert self.sink.num_used == self.source.num_used == 0
        assert not self.sink.cache.prefixes.loans  # type: ignore[union-attr]


def second_turn(source: TestedEngine, sink: TestedEngine, **options: object) -> Fetch:
    history = after_a_turn(source)
    return Fetch(source, sink, (*history, *prompt_of(7, 5)), **options)  # type: ignore[arg-type]


def test_the_second_turn_computes_only_what_is_new_wherever_the_first_was_answered() -> None:
    fetch = second_turn(engine(), engine())
    history = len(FIRST_PROMPT) + 9 - 1  # the last token of the answer was never stored
    assert fetch.whole() == len(fetch.prompt) - history // SIZE * SIZE


def test_a_third_turn_goes_on_from_what_was_fetched_for_the_second() -> None:
    source, sink = engine(), engine()
    fetch = second_turn(source, sink)
    fetch.whole()
    longer = (*fetch.prompt, *sink.tokens(fetch.key), *prompt_of(5, 6))
    third = Fetch(sink, source, longer, number=3)
    sink.events_of.pop(LEG, None)
    source.events_of.pop(LEG, None)
    assert third.whole() == len(longer) - (len(fetch.prompt) + 2) // SIZE * SIZE


def test_what_is_lent_is_what_the_oracle_needs_and_the_sink_has_not() -> None:
    fetch = second_turn(engine(), engine())
    fetch.begin()
    lent = fetch.lend((GroupRuns(FULL, ((0, 3),)),))
    for number, group in enumerate(LAYOUT.groups):
        needed = set(needed_blocks(lent.boundary, group.window, group.num_sink_tokens, SIZE))
        moved = {unit.ordinal for unit in lent.units if unit.group == number}
        assert moved == needed - (set(range(3)) if number == FULL else set())


def test_a_sink_asks_for_no_more_than_it_has_not() -> None:
    source, sink = engine(), engine()
    fetch = second_turn(source, sink)
    sink.serve_all([Serve(key(7), FIRST_PROMPT, greedy(1))])
    wanted = fetch.begin()
    assert wanted is not None
    assert wanted.own == len(FIRST_PROMPT) // SIZE * SIZE
    assert all(sum(count for _, count in entry.runs) <= 5 for entry in wanted.held)
    fetch.lend(wanted.held)
    fetch.make_room()
    fetch.land()
    sink.run()
    fetch.check()


def test_a_sink_that_has_all_of_it_asks_no_other() -> None:
    source = engine()
    fetch = second_turn(source, source, boundary=28)
    assert fetch.begin() is None


@pytest.mark.parametrize("sampling", [{"num_prompt_logprobs": 1}])
def test_a_prompt_whose_own_tokens_are_scored_is_computed_whole(sampling: dict[str, object]) -> None:
    fetch = second_turn(engine(), engine())
    assert fetch.begin(**sampling) is None


def test_blocks_of_another_tenant_are_not_lent() -> None:
    source = engine()
    source.serve_all([Serve(key(1), FIRST_PROMPT, greedy(9, ignore_eos=True, cache_salt="a"))])
    for number, salt in enumerate(("", "b", "a")):
        source.handle(LendPrefix(key(50 + number), FIRST_PROMPT[:20], salt, (), SIZE))
    boundaries = [event.boundary for event in source.events if isinstance(event, PrefixLentEvent)]
    assert boundaries == [0, 0, 20]


def test_a_prompt_computed_for_another_worker_may_begin_with_a_third_ones_blocks() -> None:
    source, sink = engine(), engine()
    fetch = second_turn(source, sink)
    assert fetch.begin(serves=False) is not None
    fetch.lend()
    fetch.make_room()
    sink.handle(Pin(fetch.key))
    fetch.land()
    sink.run()
    computed = sink.computed(fetch.key)
    assert computed is not None
    assert computed.first_token.num_cached_tokens == fetch.lent.boundary
    assert computed.first_token.token_id == reference_tokens(LAYOUT, fetch.prompt, greedy(1))[0]


# --- giving up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["asked", "lent", "room", "landed in part"])
def test_a_prefix_that_does_not_come_is_computed(moment: str) -> None:
    source, sink = engine(), engine()
    fetch = second_turn(source, sink)
    wanted = fetch.begin()
    assert wanted is not None
    if moment != "asked":
        fetch.lend(wanted.held)
    if moment in ("room", "landed in part"):
        fetch.make_room()
    if moment == "landed in part":
        fetch.copy()
        for number in range(LAYOUT.num_groups):
            sink.cache.group_view(number)[:] = sink.cache.group_view(number) * 1
    assert not sink.has_work
    sink.handle(PrefixGivenUp(fetch.key))
    source.handle(Release(LEG))
    sink.run()
    fetch.check()
    assert sink.stats().prompt_tokens_computed == len(fetch.prompt)


def test_a_source_that_has_nothing_any_more_says_so() -> None:
    fetch = second_turn(engine(), engine())
    fetch.source = engine()
    fetch.begin()
    lent = fetch.lend()
    assert (lent.boundary, lent.units) == (0, ())


def test_what_was_said_to_be_here_and_is_gone_makes_no_room() -> None:
    source, sink = engine(), engine((30, 44))
    sink.serve_all([Serve(key(7), FIRST_PROMPT[:9], greedy(1))])
    fetch = second_turn(source, sink)
    wanted = fetch.begin()
    assert wanted is not None
    assert wanted.held
    fetch.lend(wanted.held)
    prefixes = sink.cache.prefixes
    assert prefixes is not None
    node = prefixes.look_up(FIRST_PROMPT[:SIZE], "").path[0]
    prefixes.unregister(node)
    assert fetch.make_room().slots is None
    sink.handle(PrefixGivenUp(fetch.key))
    sink.run()
    source.handle(Release(LEG))
    fetch.check()


def test_room_for_a_prompt_that_is_gone_is_none() -> None:
    fetch = second_turn(engine(), engine())
    fetch.begin()
    fetch.lend()
    fetch.sink.handle(Release(fetch.key))
    assert fetch.make_room().slots is None
    assert fetch.sink.num_used == 0


# --- pressure -----------------------------------------------------------------------------------------------


def test_a_prompt_that_bytes_land_in_is_not_dropped() -> None:
    source, sink = engine(), engine((30, 44))
    fetch = second_turn(source, sink)
    fetch.begin(serves=False)
    fetch.lend()
    fetch.make_room()
    held = sink.num_used
    sink.handle(DropSoft(fetch.key))
    sink.handle(Serve(key(8), prompt_of(60, 3), greedy(40, ignore_eos=True)))
    assert sink.num_used >= held
    fetch.land()
    sink.run()
    assert sink.tokens(key(8)) == reference_tokens(LAYOUT, prompt_of(60, 3), greedy(40, ignore_eos=True))


def test_a_prompt_that_waits_for_another_worker_may_be_dropped_and_asks_no_second_time() -> None:
    source, sink = engine(), engine((30, 44))
    fetch = second_turn(source, sink)
    fetch.begin(serves=False)
    fetch.lend()
    sink.handle(DropSoft(fetch.key))
    assert sink.num_used == 0
    assert fetch.make_room().slots is None
    sink.handle(PrefixGivenUp(fetch.key))
    sink.handle(Pin(fetch.key))
    sink.run()
    assert len(sink.of(fetch.key, PrefixWantedEvent)) == 1
    computed = sink.computed(fetch.key)
    assert computed is not None
    assert computed.first_token.token_id == reference_tokens(LAYOUT, fetch.prompt, greedy(1))[0]


def test_a_loan_takes_no_room_and_its_reader_hears_when_it_is_evicted() -> None:
    source = engine((30, 44))
    fetch = second_turn(source, engine())
    fetch.lend()
    assert source.num_used == 0
    assert source.stats().pools[0].num_free == 28
    for number in range(3):
        source.serve_all([Serve(key(20 + number), prompt_of(80, 10 + number), greedy(40, ignore_eos=True))])
    assert source.of(LEG, PrefixEvictedEvent) == [PrefixEvictedEvent(LEG)]
    assert not source.cache.prefixes.loans  # type: ignore[union-attr]


def test_what_is_lent_is_evicted_after_what_is_not() -> None:
    source = engine((20, 34))
    after_a_turn(source)
    other = prompt_of(22, 2)
    source.serve_all([Serve(key(5), other, greedy(9, ignore_eos=True))])
    source.handle(LendPrefix(LEG, FIRST_PROMPT[:20], "", (), SIZE))
    source.serve_all([Serve(key(6), prompt_of(40, 9), greedy(4, ignore_eos=True))])
    prefixes = source.cache.prefixes
    assert prefixes is not None
    assert source.stats().pools[0].num_evicted + source.stats().pools[1].num_evicted > 0
    assert not source.of(LEG, PrefixEvictedEvent)


def test_a_loan_that_ended_hears_nothing() -> None:
    source = engine((30, 44))
    fetch = second_turn(source, engine())
    fetch.lend()
    source.handle(Release(LEG))
    for number in range(3):
        source.serve_all([Serve(key(20 + number), prompt_of(80, 10 + number), greedy(40, ignore_eos=True))])
    assert not source.of(LEG, PrefixEvictedEvent)


def test_blocks_that_the_reader_found_wrong_are_not_lent_again() -> None:
    source = engine()
    fetch = second_turn(source, engine())
    lent = fetch.lend()
    bad = next(unit for unit in lent.units if unit.group == FULL and unit.ordinal == 2)
    source.handle(Unregister(LEG, (UnitName(FULL, 2),)))
    assert source.of(LEG, SuspectEvent) == [SuspectEvent(LEG, (bad,))]
    source.handle(LendPrefix(key(98), fetch.prompt[: boundary_of(fetch.prompt)], "", (), SIZE))
    (again,) = source.of(key(98), PrefixLentEvent)
    assert again.boundary <= 2 * SIZE  # type: ignore[union-attr]


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_len", range(9, 26))
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_a_longer_prompt_finds_the_last_whole_block_of_the_one_before(prompt_len: int, max_tokens: int) -> None:
    """In a pool of which nothing was taken since, whatever the windows: also where the answer filled no block."""
    tested = engine()
    prompt = prompt_of(prompt_len, 4)
    tested.serve_all([Serve(key(1), prompt, greedy(max_tokens, ignore_eos=True))])
    stored = prompt_len + max_tokens - 1
    longer = (*prompt, *tested.tokens(key(1)), *prompt_of(6, 8))
    before = tested.stats().prompt_tokens_computed
    tested.serve_all([Serve(key(2), longer, greedy(1))])
    assert tested.stats().prompt_tokens_computed - before == len(longer) - stored // SIZE * SIZE


@pytest.mark.parametrize("prompt_len", range(12, 25))
def test_a_computed_prompt_holds_what_a_longer_one_goes_on_from(prompt_len: int) -> None:
    """Until its release, so that no neighbour's need for room takes it."""
    tested = engine()
    tested.handle(Prefill(key(1), prompt_of(prompt_len, 4), greedy(3, ignore_eos=True)))
    tested.run()
    sequence = tested._scheduler.get(key(1))
    assert sequence is not None
    assert sequence.cached is not None
    boundary = prompt_len // SIZE * SIZE
    for group, table in zip(LAYOUT.groups, sequence.cached.tables, strict=True):
        needed = needed_blocks(boundary, group.window, group.num_sink_tokens, SIZE)
        assert all(table[ordinal] >= 0 for ordinal in needed)


def named_in(tested: TestedEngine, kind: type) -> set[tuple[int, int]]:
    events = [event for event in tested.events if isinstance(event, kind)]
    return {(unit.group, unit.ordinal) for event in events for unit in event.units}  # type: ignore[attr-defined]


def test_blocks_that_are_full_are_named_to_be_hashed() -> None:
    tested = engine()
    history = after_a_turn(tested)
    every = {(group, ordinal) for group in range(LAYOUT.num_groups) for ordinal in range((len(history) - 1) // SIZE)}
    assert named_in(tested, RegisteredEvent) == every


def test_blocks_that_a_decode_worker_is_told_of_are_not_named_twice() -> None:
    tested = engine()
    tested.handle(Prefill(key(1), FIRST_PROMPT, greedy(3)))
    tested.run()
    registered, final = named_in(tested, RegisteredEvent), named_in(tested, UnitsFinalEvent)
    assert not registered & final
    full = {(group, ordinal) for group in range(LAYOUT.num_groups) for ordinal in range(len(FIRST_PROMPT) // SIZE)}
    assert full <= registered | final


# --- any schedule -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
@settings(max_examples=60)
def test_under_any_schedule_answers_are_right_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    source, sink = engine((26, 40)), engine((26, 40))
    history = after_a_turn(source, max_tokens=rng.choice([2, 9, 14]))
    if rng.random() < 0.4:
        sink.serve_all([Serve(key(7), FIRST_PROMPT[: rng.randrange(4, 23)], greedy(1))])
    fetch = Fetch(source, sink, (*history, *prompt_of(rng.randrange(1, 9), 5)))
    noise = 20
    steps = ["begin", "lend", "room", "land"]
    wanted = None
    while steps:
        if rng.random() < 0.5:
            noise += 1
            which = rng.choice([source, sink])
            which.handle(Serve(key(noise), prompt_of(rng.randrange(5, 50), noise), greedy(rng.randrange(1, 20))))
        for which in (source, sink):
            for _ in range(rng.randrange(3)):
                if which.has_work:
                    which.step()
        if rng.random() < 0.12 and wanted is not None:
            break
        match steps.pop(0):
            case "begin":
                wanted = fetch.begin()
                while wanted is None and sink.has_work and not sink.of(fetch.key, PrefixWantedEvent):
                    sink.step()
                found = sink.of(fetch.key, PrefixWantedEvent)
                wanted = found[0] if found else None  # type: ignore[assignment]
                if wanted is None:
                    break
            case "lend":
                assert wanted is not None
                if fetch.lend(wanted.held).boundary == 0:
                    break
            case "room":
                if fetch.make_room().slots is None:
                    break
            case "land":
                if source.of(LEG, PrefixEvictedEvent):
                    break
                fetch.land()
                wanted = None
    if wanted is not None:
        sink.handle(PrefixGivenUp(fetch.key))
    source.handle(Release(LEG))
    source.run()
    sink.run()
    fetch.check()
    for number in range(21, noise + 1):
        for which in (source, sink):
            if which.of(key(number)):
                assert which.ending(key(number))
