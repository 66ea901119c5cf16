"""Several answers to one prompt: its blocks are shared, and each answer is that of a request of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.engine.commands import (
    AttemptKey,
    Decode,
    DropChoice,
    FailedEvent,
    FinishedEvent,
    Pin,
    Prefill,
    Release,
    Reserve,
    Serve,
    TokensEvent,
)
from disagg.transceiver.wire.messages.values import Sampling

CHOICES = 3


def drawn(max_tokens=9, num_choices=CHOICES, **others):
    return Sampling(max_tokens=max_tokens, seed=5, num_choices=num_choices, **others)


def choice_key(number, choice):
    return AttemptKey(key(number).transfer_id, 1, choice)


def check_answers(engine, number, prompt, sampling, choices=None):
    for choice in range(sampling.num_choices) if choices is None else choices:
        alone = reference_tokens(LAYOUT, prompt, sampling.of_choice(choice))
        assert engine.tokens(choice_key(number, choice)) == alone, choice
        assert isinstance(engine.ending(choice_key(number, choice)), FinishedEvent)


def moved(source, target, number, prompt, sampling):
    source.serve_all([Prefill(key(number), prompt, sampling), Pin(key(number))])
    target.handle(Reserve(key(number), prompt, sampling))
    target.handle(Decode(key(number), transfer(source, target, key(number), len(prompt))))
    source.handle(Release(key(number)))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 23, 24, 25])
@pytest.mark.parametrize("hasher", [None, HASHER], ids=["no reuse", "reuse"])
@pytest.mark.parametrize("ahead", [None, 1], ids=["in turn", "ahead"])
def test_choices_equal_requests_of_their_own_here_and_after_a_transfer(length, hasher, ahead):
    prompt = prompt_of(length, 1)
    served = TestedEngine(hasher=hasher, steps_ahead=ahead)
    served.serve_all([Serve(key(1), prompt, drawn())])
    source = TestedEngine(role="prefill", hasher=hasher, steps_ahead=ahead)
    target = TestedEngine(role="decode", hasher=hasher, steps_ahead=ahead)
    moved(source, target, 1, prompt, drawn())
    target.run()
    for engine in (served, target):
        check_answers(engine, 1, prompt, drawn())
        assert engine.num_used == 0
        assert not engine.stats().live_keys
        assert engine.stats().num_preemptions == 0
    assert len({tuple(served.tokens(choice_key(1, choice))) for choice in range(CHOICES)}) > 1  # the seeds matter
    assert target.stats().prompt_tokens_computed == 0
    assert served.stats().prompt_tokens_computed == source.stats().prompt_tokens_computed == length


def test_whole_blocks_are_held_once_and_the_last_in_part_once_per_choice():
    """Windows of 6 and 11, sinks of 3, blocks of 4: at 25 tokens, of each group what its oracle keeps."""
    prompt = prompt_of(25, 1)
    alone, shared = TestedEngine(), TestedEngine()
    alone.handle(Serve(key(1), prompt, drawn(num_choices=1)))
    shared.handle(Serve(key(1), prompt, drawn()))
    for engine in (alone, shared):
        while not engine.of(key(1), TokensEvent):
            engine.step()
    num_copies = LAYOUT.num_groups * (CHOICES - 1)  # 25 = 6 * 4 + 1: one block in part, in every group
    assert shared.num_used == alone.num_used + num_copies


def test_a_choice_that_is_dropped_leaves_the_others():
    engine, prompt = TestedEngine(), prompt_of(21, 1)
    engine.handle(Serve(key(1), prompt, drawn(20)))
    for _ in range(6):
        engine.step()
    engine.handle(DropChoice(choice_key(1, 0)))  # the one that computed the prompt
    engine.handle(DropChoice(choice_key(1, 0)))
    engine.run()
    check_answers(engine, 1, prompt, drawn(20), choices=(1, 2))
    assert engine.num_used == 0


def test_a_release_takes_every_choice():
    engine = TestedEngine()
    engine.handle(Serve(key(1), prompt_of(21, 1), drawn(40)))
    for _ in range(6):
        engine.step()
    assert len(engine.stats().live_keys) == CHOICES
    engine.handle(Release(key(1)))
    assert engine.num_used == 0
    assert not engine.stats().live_keys


def test_a_choice_whose_first_token_ends_it_holds_nothing():
    prompt = prompt_of(13, 1)
    firsts = [reference_tokens(LAYOUT, prompt, drawn(1).of_choice(choice))[0] for choice in range(CHOICES)]
    for stop in sorted(set(firsts)):
        sampling = drawn(stop_token_ids=(stop,))
        for transferred in (False, True):
            engine = TestedEngine()
            if transferred:
                source = TestedEngine()
                moved(source, engine, 1, prompt, sampling)
                assert not source.computed(key(1)).finished
            else:
                engine.handle(Serve(key(1), prompt, sampling))
            engine.run()
            check_answers(engine, 1, prompt, sampling)
            assert engine.num_used == 0


def test_without_a_seat_choices_wait_and_are_computed_anew():
    engine, prompt = TestedEngine(max_num_seqs=2, hasher=HASHER), prompt_of(21, 1)
    engine.serve_all([Serve(key(1), prompt, drawn(num_choices=5))])
    check_answers(engine, 1, prompt, drawn(num_choices=5))
    assert engine.num_used == 0


def test_logits_that_are_not_finite_fail_the_request():
    engine = TestedEngine(poison=prompt_of(20, 1)[3])
    engine.serve_all([Serve(key(1), prompt_of(20, 1), drawn())])
    assert isinstance(engine.ending(key(1)), FailedEvent)
    assert engine.num_used == 0


def test_a_shared_block_that_was_overwritten_shows_in_every_choice():
    """Negative control: the answers do read the shared blocks."""
    engine, prompt = TestedEngine(), prompt_of(24, 1)
    engine.handle(Serve(key(1), prompt, drawn(20)))
    while not engine.of(key(1), TokensEvent):
        engine.step()
    full = next(number for number, group in enumerate(LAYOUT.groups) if group.window is None)
    tables = [engine._scheduler.live[choice_key(1, choice)].cached.tables[full] for choice in range(CHOICES)]
    assert len({int(table[1]) for table in tables}) == 1
    engine.cache.group_view(full)[int(tables[0][1]), 0, 0, 0, 0] += 1
    engine.run()
    for choice in range(CHOICES):
        alone = reference_tokens(LAYOUT, prompt, drawn(20).of_choice(choice))
        assert engine.tokens(choice_key(1, choice)) != alone


REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.booleans()), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=20)
@given(REQUESTS, st.integers(1, 4), st.sampled_from([(16, 26), (60, 120)]), st.sampled_from([None, HASHER]), st.data())
def test_any_schedule_in_tight_pools_gives_the_answers_of_single_requests(requests, seats, room, hasher, data):
    ahead = data.draw(st.sampled_from([None, 1]))
    engine = TestedEngine(max_num_seqs=seats, num_slots=room, hasher=hasher, steps_ahead=ahead)
    source = TestedEngine(role="prefill", hasher=hasher)
    asked = {}
    for number, (length, max_tokens, num_choices, is_moved) in enumerate(requests):
        prompt, sampling = prompt_of(length, number % 2), drawn(max_tokens, num_choices)
        asked[number] = prompt, sampling
        command = (Reserve if is_moved else Serve)(key(number), prompt, sampling)
        engine.handle(command)
        if is_moved and engine.reserved(key(number)) is not None:
            source.serve_all([Prefill(key(number), prompt, sampling), Pin(key(number))])
            engine.handle(Decode(key(number), transfer(source, engine, key(number), len(prompt))))
            source.handle(Release(key(number)))
        elif is_moved:
            engine.handle(Release(key(number)))
            del asked[number]
        for _ in range(data.draw(st.integers(0, 4))):
            engine.step()
    engine.run()
    for number, (prompt, sampling) in asked.items():
        check_answers(engine, number, prompt, sampling)
    assert engine.num_used == source.num_used == 0
