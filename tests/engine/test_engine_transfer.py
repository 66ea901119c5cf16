"""Prefill on one engine, decode on another: soft and pinned prompts, reservations, and what may be told of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.engine.commands import (
    Decode,
    DropSoft,
    FailedEvent,
    FinishedEvent,
    Pin,
    PinnedEvent,
    Prefill,
    PromptComputedEvent,
    Release,
    Reserve,
    ReservedEvent,
    Serve,
    SoftDroppedEvent,
    TokensEvent,
    UnitsFinalEvent,
)
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState

torch.set_num_threads(1)

SMALL = (16, 26)
"""Room for one prompt of 40 tokens and half of another (its peak is 11 and 18 of 14 and 24 usable slots)."""


def prefill(number, length, sampling=None):
    return Prefill(key(number), prompt_of(length, number), sampling or greedy(5))


def kinds(events):
    return [type(event).__name__ for event in events]


def pair(**limits):
    return TestedEngine(role="prefill", **limits), TestedEngine(role="decode", **limits)


def run_pair(length, sampling, number=1, **limits):
    source, target = pair(**limits)
    prompt = prompt_of(length, number)
    target.handle(Reserve(key(number), prompt, sampling))
    source.handle(Prefill(key(number), prompt, sampling))
    source.handle(Pin(key(number)))
    source.run()
    verified = transfer(source, target, key(number), length)
    source.handle(Release(key(number)))
    target.handle(Decode(key(number), verified))
    target.run()
    return source, target


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 15), st.integers(4, 33), st.integers(0, 2))
def test_tokens_after_a_transfer_equal_those_of_a_model_without_blocks(length, max_tokens, batched_tokens, seed):
    sampling = Sampling(max_tokens=max_tokens, seed=seed, temperature=float(seed))
    source, target = run_pair(length, sampling, max_num_seqs=4, max_num_batched_tokens=batched_tokens)
    assert target.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(length, 1), sampling)
    assert target.stats().prompt_tokens_computed == 0
    assert source.stats().prompt_tokens_computed == length
    assert source.num_used == target.num_used == 0


def test_one_block_too_few_shows_in_the_tokens():
    """Negative control: the fake transfer leaves out the oldest block of a window."""
    source, target = pair()
    target.handle(Reserve(key(1), prompt_of(30, 1), greedy(9)))
    source.handle(prefill(1, 30, greedy(9)))
    source.run()
    verified = transfer(source, target, key(1), 30)
    _, slot = target.reserved(key(1)).slots[0][1]
    target.cache.group_view(0)[slot] = 0
    target.handle(Decode(key(1), verified))
    target.run()
    assert target.tokens(key(1)) != reference_tokens(LAYOUT, prompt_of(30, 1), greedy(9))


def test_units_are_told_once_as_they_become_final_and_before_the_prompt_is():
    source = TestedEngine(role="prefill", max_num_batched_tokens=8, max_num_seqs=4)
    source.handle(prefill(1, 26))
    source.run()
    events = source.of(key(1))
    assert kinds(events) == ["UnitsFinalEvent"] * 4 + ["PromptComputedEvent"]
    ordinals = [[u.ordinal for u in event.units if u.group == 1] for event in events[:-1]]
    assert ordinals == [[0, 1], [2, 3], [4, 5], [6]]
    units = [(u.group, u.ordinal) for u in source.final_units(key(1), 0)]
    assert len(set(units)) == len(units)


def test_computed_blocks_are_held_until_release():
    source = TestedEngine(role="prefill")
    source.handle(prefill(1, 26))
    source.handle(Pin(key(1)))
    source.run()
    assert source.stats().num_held == 1
    assert not source.has_work
    assert source.num_used == len(source.final_units(key(1), 0))
    source.handle(Release(key(1)))
    assert source.num_used == 0


# --- first tokens that end the answer -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "finished"),
    [
        ({"eos_token_ids": "first"}, True),
        ({"stop_token_ids": "first"}, True),
        ({"eos_token_ids": "first", "ignore_eos": True}, False),
        ({"eos_token_ids": "first", "min_tokens": 2}, False),
        ({}, False),
    ],
)
def test_a_first_token_that_stops_is_told_and_the_blocks_stay(options, finished):
    (first,) = reference_tokens(LAYOUT, prompt_of(20, 1), greedy(1))
    chosen = {name: (first,) if value == "first" else value for name, value in options.items()}
    source = TestedEngine(role="prefill")
    source.handle(prefill(1, 20, greedy(5, **chosen)))
    source.run()
    event = source.computed(key(1))
    assert event.finished == finished
    assert event.stop_token_id == (first if finished else None)
    assert source.num_used > 0
    source.handle(Release(key(1)))
    assert source.num_used == 0


def test_the_first_token_carries_seed_and_counts():
    source = TestedEngine(role="prefill")
    source.handle(prefill(1, 20, Sampling(max_tokens=5, seed=7, num_logprobs=1)))
    source.run()
    first = source.computed(key(1)).first_token
    assert first.state == SamplingState(7, ((first.token_id, 1),))
    assert first.logprobs is not None


def test_a_decode_of_one_token_ends_at_once():
    _, target = run_pair(20, greedy(1))
    assert kinds(target.of(key(1))) == ["ReservedEvent", "TokensEvent", "FinishedEvent"]
    assert target.ending(key(1)) == FinishedEvent(key(1), 1, "length")


# --- soft and pinned ------------------------------------------------------------------------------------------


def test_a_pin_is_answered_at_once_when_the_blocks_live():
    source = TestedEngine(role="prefill", num_slots=SMALL)
    source.handle(prefill(1, 40))
    assert source.handle(Pin(key(1))) == [PinnedEvent(key(1), 0)]
    assert source.handle(Pin(key(1))) == [PinnedEvent(key(1), 0)]
    source.run()
    assert source.computed(key(1)) is not None


def test_soft_prompts_are_dropped_newest_first_and_only_as_many_as_it_takes():
    source = TestedEngine(num_slots=(30, 30), max_num_batched_tokens=64)
    for number in (1, 2, 3):
        source.handle(prefill(number, 16))
    source.run()
    assert source.stats().num_soft == 3
    events = source.handle(Serve(key(4), prompt_of(20, 4), greedy(4)))
    assert events == [SoftDroppedEvent(key(3), 0)]
    source.run()
    assert source.tokens(key(4)) == reference_tokens(LAYOUT, prompt_of(20, 4), greedy(4))
    assert source.of(key(1), SoftDroppedEvent) == source.of(key(2), SoftDroppedEvent) == []


def test_a_dropped_prompt_is_computed_again_after_its_pin_and_gives_the_same_tokens():
    source, target = TestedEngine(num_slots=SMALL), TestedEngine(role="decode")
    target.handle(Reserve(key(1), prompt_of(40, 1), greedy(6)))
    source.handle(prefill(1, 40, greedy(6)))
    source.run()
    assert source.handle(Serve(key(2), prompt_of(40, 2), greedy(3))) == [SoftDroppedEvent(key(1), 0)]
    assert source.handle(Pin(key(1))) == []
    source.run()
    assert source.of(key(1), PinnedEvent) == [PinnedEvent(key(1), 1)]
    first, second = source.of(key(1), PromptComputedEvent)
    assert (first.compute_id, second.compute_id) == (0, 1)
    assert first.first_token == second.first_token
    target.handle(Decode(key(1), transfer(source, target, key(1), 40)))
    target.run()
    assert target.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(40, 1), greedy(6))


def test_nothing_is_dropped_in_vain():
    """What is pinned fills the pool, so dropping the soft prompt would not seat the newcomer."""
    source = TestedEngine(num_slots=(40, 40), max_num_batched_tokens=64)
    source.handle(prefill(1, 60))
    source.handle(Pin(key(1)))
    source.handle(prefill(2, 8))
    assert source.handle(Serve(key(3), prompt_of(40, 3), greedy(4))) == []
    source.run()
    assert source.of(key(2), SoftDroppedEvent) == []
    source.handle(Release(key(1)))
    source.run()
    assert source.ending(key(3)).reason == "length"


def test_a_pinned_prompt_is_never_dropped():
    source = TestedEngine(num_slots=SMALL)
    source.handle(prefill(1, 40))
    source.handle(Pin(key(1)))
    source.handle(Serve(key(2), prompt_of(40, 2), greedy(3)))
    source.run()
    assert source.of(key(1), SoftDroppedEvent) == []
    assert source.of(key(2)) == []
    source.handle(Release(key(1)))
    source.run()
    assert len(source.tokens(key(2))) == 3


def test_a_short_pinned_prompt_passes_a_long_one_that_is_granted_no_later_for_it():
    """3 was pinned before 2, but does not fit beside 4; 2 fits beside either."""
    source = TestedEngine(role="prefill", num_slots=(30, 26), max_num_batched_tokens=64)
    for number, length in ((4, 40), (3, 40), (2, 4)):
        source.handle(prefill(number, length))
        source.handle(DropSoft(key(number)))
    for number in (4, 3, 2):
        source.handle(Pin(key(number)))
    source.run()
    assert [e.key for e in source.events if isinstance(e, PinnedEvent)] == [key(4), key(2)]
    source.handle(Release(key(4)))
    assert [e.key for e in source.events if isinstance(e, PinnedEvent)][2] == key(3)


def test_soft_prompts_do_not_start_while_somebody_waits_for_room():
    source = TestedEngine(num_slots=SMALL)
    source.handle(prefill(1, 40))
    source.handle(Pin(key(1)))
    source.handle(Serve(key(2), prompt_of(40, 2), greedy(2)))
    source.handle(prefill(3, 4))
    source.run()
    assert source.of(key(3)) == []
    source.handle(Release(key(1)))
    source.run()
    assert source.computed(key(3)) is not None


def test_drop_soft_gives_blocks_back_and_leaves_the_request():
    source = TestedEngine(role="prefill")
    source.handle(prefill(1, 40))
    source.step()
    assert source.handle(DropSoft(key(1))) == [SoftDroppedEvent(key(1), 0)]
    assert source.handle(DropSoft(key(1))) == []
    assert source.num_used == 0
    assert not source.has_work
    assert source.stats().live_keys == (key(1),)
    assert source.handle(Pin(key(1))) == [PinnedEvent(key(1), 1)]
    assert source.handle(DropSoft(key(1))) == []
    source.run()
    assert source.computed(key(1)).compute_id == 1


# --- reservations ---------------------------------------------------------------------------------------------


def test_a_reservation_holds_only_what_will_be_read_and_the_next_block():
    target = TestedEngine(role="decode")
    (event,) = target.handle(Reserve(key(1), prompt_of(40, 1), greedy(9)))
    assert [[ordinal for ordinal, _ in group] for group in event.slots] == [[0, 8, 9], list(range(10)), [0, 7, 8, 9]]
    assert target.num_used == sum(len(group) for group in event.slots) + 3
    assert not target.has_work


def test_reservations_without_room_queue_in_order():
    target = TestedEngine(role="decode", num_slots=SMALL)
    for number, length in ((1, 60), (2, 60), (3, 4)):
        target.handle(Reserve(key(number), prompt_of(length, number), greedy(5)))
    assert [e.key for e in target.events] == [key(1)]
    assert target.stats().num_waiting == 2
    target.handle(Release(key(1)))
    assert [e.key for e in target.events] == [key(1), key(2)]


def test_an_urgent_request_goes_before_the_line_and_holds_nothing_while_it_waits():
    target = TestedEngine(role="decode", num_slots=SMALL)
    for number in (1, 2):
        target.handle(Reserve(key(number), prompt_of(60, number), greedy(5)))
    target.handle(Serve(key(3), prompt_of(50, 3), greedy(5), urgent=True))
    used = target.num_used
    target.handle(Release(key(1)))
    assert used > 0
    assert target.of(key(2)) == []
    target.run()
    assert target.tokens(key(3)) == reference_tokens(LAYOUT, prompt_of(50, 3), greedy(5))
    assert isinstance(target.events[-1], ReservedEvent)


def test_only_the_licence_of_its_own_attempt_lets_a_reservation_decode():
    target = TestedEngine(role="decode")
    target.handle(Reserve(key(1), prompt_of(9, 1), greedy(5)))
    other = Verified(key(1).transfer_id, 2, FirstToken(1, None, SamplingState(0)))
    with pytest.raises(AssertionError, match="licensed for"):
        target.handle(Decode(key(1), other))


# --- release in every state -----------------------------------------------------------------------------------


def states():
    serve = Serve(key(1), prompt_of(40, 1), greedy(9))
    urgent = Serve(key(1), prompt_of(40, 1), greedy(9), urgent=True)
    verified = Verified(key(1).transfer_id, 1, FirstToken(1, None, SamplingState(0)))
    reserve = Reserve(key(1), prompt_of(40, 1), greedy(9))
    blocker = Reserve(key(8), prompt_of(60, 8), greedy(9))
    pinned_late = [prefill(1, 40), DropSoft(key(1)), Pin(key(1))]
    return {
        "serve queued": ([blocker, serve], 0),
        "urgent queued": ([blocker, urgent], 0),
        "serve prefilling": ([serve], 1),
        "serve decoding": ([serve], 5),
        "soft waiting": ([blocker, prefill(1, 40)], 0),
        "soft computing": ([prefill(1, 40)], 1),
        "soft computed": ([prefill(1, 40)], 9),
        "parked": ([prefill(1, 40), DropSoft(key(1))], 0),
        "pinned waiting": ([blocker, *pinned_late], 0),
        "pinned computing": ([*pinned_late], 1),
        "pinned computed": ([*pinned_late], 9),
        "reservation queued": ([blocker, reserve], 0),
        "reservation": ([reserve], 0),
        "decoding": ([reserve, Decode(key(1), verified)], 1),
    }


@pytest.mark.parametrize("state", states())
def test_a_release_in_any_state_leaves_nothing_behind(state):
    commands, num_steps = states()[state]
    engine = TestedEngine(num_slots=SMALL)
    for command in commands:
        engine.handle(command)
    for _ in range(num_steps):
        engine.step()
    assert key(1) in engine.stats().live_keys
    assert not engine.of(key(1), (FinishedEvent, FailedEvent))
    engine.handle(Release(key(1)))
    assert engine.handle(Release(key(1))) == []
    engine.handle(Release(key(8)))
    stats = engine.stats()
    assert (stats.num_used_slots, stats.live_keys, stats.num_waiting, engine.has_work) == (0, (), 0, False)
    engine.serve_all([Serve(key(7), prompt_of(40, 7), greedy(2))])
    assert len(engine.of(key(7), TokensEvent)) == 2


def test_units_of_a_released_prompt_are_told_no_more():
    source = TestedEngine(role="prefill", max_num_batched_tokens=8)
    source.handle(prefill(1, 40))
    source.step()
    source.handle(Release(key(1)))
    assert not any(isinstance(event, UnitsFinalEvent) for event in source.run())
