"""An answer that moves in the middle goes on as if it had stayed, wherever it is cut and whatever fails."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens
from support.oracles.cache_oracle import needed_blocks

from disagg.engine.commands import (
    Decode,
    Extend,
    FinishedEvent,
    Freeze,
    FrozenEvent,
    MoveRefusedEvent,
    Pin,
    Prefill,
    PressedEvent,
    Release,
    Reserve,
    Serve,
    Thaw,
    TokensEvent,
)
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState

ANSWER, ARRIVED = key(1), key(1, epoch=2)
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}


def begun(prompt_len: int, num_tokens: int, sampling: Sampling, **options: object) -> TestedEngine:
    """An engine that has emitted `num_tokens` of the answer, at least."""
    source = TestedEngine(**options)  # type: ignore[arg-type]
    source.handle(Serve(ANSWER, prompt_of(prompt_len), sampling))
    step_until(source, num_tokens)
    return source


def step_until(engine: TestedEngine, num_tokens: int) -> None:
    while len(engine.tokens(ANSWER)) < num_tokens and engine.has_work:
        engine.step()


def frozen(engine: TestedEngine) -> FrozenEvent:
    """Freeze the answer, and see the step under way end."""
    engine.handle(Freeze(ANSWER))
    engine.run()
    (event,) = engine.of(ANSWER, FrozenEvent)[-1:]
    assert isinstance(event, FrozenEvent)
    return event


def land(source: TestedEngine, target: TestedEngine, event: FrozenEvent, prompt_len: int) -> set[tuple[int, int]]:
    """Copy what the reservation awaits; the (group, ordinal) that moved."""
    units, reserved = {(u.group, u.ordinal): u for u in event.units}, target.reserved(ARRIVED)
    assert reserved is not None
    count, moved = prompt_len + len(event.output) - 1, set()
    for number, group in enumerate(LAYOUT.groups):
        needed = needed_blocks(count, group.window, group.num_sink_tokens, LAYOUT.block_size)
        assert sorted(o for g, o in units if g == number) == needed
        for ordinal, slot in reserved.slots[number]:
            target.cache.group_view(number)[slot] = source.cache.group_view(number)[units[number, ordinal].slot]
            moved.add((number, ordinal))
    return moved


def licence(event: FrozenEvent, sampling: Sampling) -> Verified:
    state = SamplingState(sampling.seed)
    return Verified(ARRIVED.transfer_id, ARRIVED.epoch, FirstToken(event.output[-1], None, state))


def reserve(target: TestedEngine, prompt_len: int, known: list[int], sampling: Sampling) -> None:
    target.handle(Reserve(ARRIVED, prompt_of(prompt_len), sampling, output=tuple(known[:-1])))


def arrive(target: TestedEngine, event: FrozenEvent, sampling: Sampling) -> None:
    target.handle(Decode(ARRIVED, licence(event, sampling)))


def told_by(target: TestedEngine) -> list[int]:
    """Tokens of the answer that came, without those from before, numbered without a gap."""
    events = [event for event in target.of(ARRIVED, TokensEvent) if isinstance(event, TokensEvent)]
    assert [event.index for event in events] == list(range(events[0].index, events[0].index + len(events)))
    return [token for event in events for token in event.token_ids]


SAMPLINGS = st.sampled_from(
    [
        greedy(40),
        Sampling(max_tokens=40, seed=3, temperature=1.0),
        Sampling(max_tokens=40, seed=4, temperature=0.8, top_k=9, **PENALISED),  # type: ignore[arg-type]
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    prompt_len=st.integers(1, 30),
    num_known=st.integers(1, 25),
    num_more=st.integers(0, 12),
    sampling=SAMPLINGS,
    steps_ahead=st.sampled_from([None, 0, 1]),
    reuses=st.booleans(),
)
def test_an_answer_moved_anywhere_goes_on_with_its_own_tokens(
    prompt_len: int, num_known: int, num_more: int, sampling: Sampling, steps_ahead: int | None, reuses: bool
) -> None:
    hasher = HASHER if reuses else None
    source = begun(prompt_len, num_known, sampling, steps_ahead=steps_ahead, hasher=hasher)
    target = TestedEngine(steps_ahead=steps_ahead, hasher=hasher)
    if reuses:  # the target holds some of it, and the window has let go of some of that
        target.serve_all([Serve(key(7), prompt_of(prompt_len), greedy(1))])
    reserve(target, prompt_len, source.tokens(ANSWER), sampling)
    step_until(source, num_known + num_more)
    event = frozen(source)
    target.handle(Extend(ARRIVED, event.output[:-1]))
    land(source, target, event, prompt_len)
    arrive(target, event, sampling)
    source.handle(Release(ANSWER))
    target.run()
    whole = reference_tokens(LAYOUT, prompt_of(prompt_len), sampling)
    assert source.tokens(ANSWER) == list(event.output)
    assert [*event.output[:-1], *told_by(target)] == whole
    assert isinstance(target.ending(ARRIVED), FinishedEvent)
    assert source.num_used == target.num_used == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 4), st.sampled_from([None, 1]))
def test_an_answer_frozen_and_thawed_any_number_of_times_is_the_one_that_never_stopped(
    prompt_len: int, num_known: int, times: int, steps_ahead: int | None
) -> None:
    source = begun(prompt_len, num_known, greedy(40), steps_ahead=steps_ahead)
    for _ in range(times):
        event = frozen(source)
        assert not source.has_work
        names = {(unit.pool, unit.slot): unit.generation for unit in event.units}
        source.handle(Thaw(ANSWER))
        partial = [u for u in event.units if u.ordinal == (prompt_len + len(event.output) - 1) // LAYOUT.block_size]
        for unit in partial:  # what was shown to a peer is not written under that name
            assert source.cache.pools[unit.pool].generations[unit.slot] > names[unit.pool, unit.slot]
        step_until(source, len(event.output) + 3)
    source.run()
    assert source.tokens(ANSWER) == reference_tokens(LAYOUT, prompt_of(prompt_len), greedy(40))
    assert source.num_used == 0


def test_what_the_target_holds_is_not_asked_for_again() -> None:
    source, target = begun(24, 9, greedy(40), hasher=HASHER), TestedEngine(hasher=HASHER)
    target.serve_all([Serve(key(7), prompt_of(24), greedy(1))])
    reserve(target, 24, source.tokens(ANSWER), greedy(40))
    step_until(source, 12)
    event = frozen(source)
    target.handle(Extend(ARRIVED, event.output[:-1]))
    moved = land(source, target, event, 24)
    full = next(number for number, group in enumerate(LAYOUT.groups) if group.window is None)
    assert sorted(o for g, o in moved if g == full) == [6, 7, 8]  # the prompt's six blocks were there
    assert len(moved) < len(event.units)


def test_an_answer_that_outgrows_the_room_made_for_it_is_refused_and_stays() -> None:
    source = begun(8, 2, greedy(60))
    target = TestedEngine(num_slots=(2 + 60, 2 + 44))
    reserve(target, 8, source.tokens(ANSWER), greedy(60))
    assert target.reserved(ARRIVED) is not None
    target.handle(Serve(key(8), prompt_of(90), greedy(3)))
    for _ in range(3):
        target.step()
    step_until(source, 50)
    event = frozen(source)
    (refused,) = target.handle(Extend(ARRIVED, event.output[:-1]))
    assert isinstance(refused, MoveRefusedEvent)
    target.handle(Release(ARRIVED))
    target.run()
    assert target.num_used == 0
    source.handle(Thaw(ANSWER))
    source.run()
    assert source.tokens(ANSWER) == reference_tokens(LAYOUT, prompt_of(8), greedy(60))


@pytest.mark.parametrize("state", ["unknown", "waiting", "reserved"])
def test_what_is_no_answer_yet_cannot_be_frozen(state: str) -> None:
    engine = TestedEngine(max_num_seqs=1)
    if state != "unknown":
        engine.handle(Serve(key(9), prompt_of(5), greedy(30)))
        kind = Serve if state == "waiting" else Reserve
        engine.handle(kind(ANSWER, prompt_of(5), greedy(5)))
    (refused,) = engine.handle(Freeze(ANSWER))
    assert isinstance(refused, MoveRefusedEvent)
    engine.run()


def test_kv_that_has_been_through_another_format_stays_where_it_is() -> None:
    """A worker that took it over would keep it as its own: a lossy prefix must never pass for an exact one."""
    source, middle = TestedEngine(role="prefill", hasher=HASHER), TestedEngine(role="decode", hasher=HASHER)
    source.handle(Prefill(ANSWER, prompt_of(9), greedy(20)))
    source.handle(Pin(ANSWER))
    source.run()
    middle.handle(Reserve(ANSWER, prompt_of(9), greedy(20), precision="float16:ab"))
    middle.handle(Decode(ANSWER, transfer(source, middle, ANSWER, 9)))
    (refused,) = middle.handle(Freeze(ANSWER))
    assert isinstance(refused, MoveRefusedEvent)
    assert "other formats" in refused.reason
    middle.run()


def test_a_frozen_answer_is_never_the_one_that_gives_way() -> None:
    engine = TestedEngine(num_slots=(2 + 60, 2 + 44), max_num_batched_tokens=16)
    for number in range(2, 7):
        engine.handle(Serve(key(number), prompt_of(8, number), greedy(40)))
    engine.handle(Serve(ANSWER, prompt_of(8), greedy(40)))  # the newest: first to give way
    step_until(engine, 2)
    event = frozen_beside(engine)
    engine.run()
    assert engine.stats().num_preemptions > 0
    (name,) = {engine.cache.pools[unit.pool].generations[unit.slot] == unit.generation for unit in event.units}
    assert name
    engine.handle(Thaw(ANSWER))
    engine.run()
    assert engine.tokens(ANSWER) == reference_tokens(LAYOUT, prompt_of(8), greedy(40))
    assert engine.num_used == 0


def frozen_beside(engine: TestedEngine) -> FrozenEvent:
    engine.handle(Freeze(ANSWER))
    (event,) = engine.of(ANSWER, FrozenEvent)
    assert isinstance(event, FrozenEvent)
    return event


@pytest.mark.parametrize(("age", "victim"), [(50.0, 3), (0.0, 1)], ids=["came first", "came last"])
def test_the_order_of_arrival_goes_along(age: float, victim: int) -> None:
    """An answer that began long ago is not the first victim where it has just arrived."""
    source = begun(8, 4, greedy(40))
    target = TestedEngine(num_slots=(2 + 60, 2 + 44), max_num_batched_tokens=16)
    for number in (2, 3):
        target.handle(Serve(key(number), prompt_of(8, number), greedy(40), arrived_at=100.0 + number))
    target.handle(
        Reserve(ARRIVED, prompt_of(8), greedy(40), output=tuple(source.tokens(ANSWER)[:-1]), arrived_at=110.0 - age)
    )
    event = frozen(source)
    target.handle(Extend(ARRIVED, event.output[:-1]))
    land(source, target, event, 8)
    arrive(target, event, greedy(40))
    preempted: set[int] = set()
    while target.has_work and not preempted:
        target.step()
        preempted = {int(s.key.transfer_id, 16) for s in target._scheduler._urgent}
    assert preempted == {victim}
    target.run()
    whole = reference_tokens(LAYOUT, prompt_of(8), greedy(40))
    assert [*event.output[:-1], *told_by(target)] == whole


def test_the_answer_that_gives_way_first_is_named_before_it_does_and_not_in_every_step() -> None:
    engine = TestedEngine(num_slots=(2 + 60, 2 + 44), max_num_batched_tokens=16)
    for number in range(1, 7):
        engine.handle(Serve(key(number), prompt_of(8, number), greedy(40)))
    while not any(isinstance(event, PressedEvent) for event in engine.events):
        engine.step()
    assert engine.stats().num_preemptions == 0
    (named,) = {event.key for event in engine.events if isinstance(event, PressedEvent)}
    while not engine.stats().num_preemptions:
        engine.step()
    assert engine._scheduler._urgent[0].key == named
    engine.run()
    names = Counter(event.key for event in engine.events if isinstance(event, PressedEvent))
    assert max(names.values()) <= 40 // LAYOUT.block_size


def test_in_ample_pools_no_answer_is_named() -> None:
    engine = TestedEngine(num_slots=(200, 400))
    engine.serve_all([Serve(key(number), prompt_of(8, number), greedy(40)) for number in range(1, 7)])
    assert not any(isinstance(event, PressedEvent) for event in engine.events)


def test_log_probabilities_of_the_newest_tokens_go_along_where_they_are_asked_for() -> None:
    sampling = greedy(20, num_logprobs=2)
    source = begun(6, 5, sampling)
    event = frozen(source)
    told = [p for e in source.of(ANSWER, TokensEvent) if isinstance(e, TokensEvent) for p in e.logprobs]
    assert list(event.logprobs) == told
    assert len(told) == len(event.output)
