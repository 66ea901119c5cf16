"""More answers than the pools hold to their ends: the newest give way, are computed anew, and say nothing twice."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.cache.admission import Promises, peak_slots
from disagg.cache.identity import BlockHasher
from disagg.engine.commands import Decode, FinishedEvent, Pin, Prefill, Release, Reserve, Serve, TokensEvent
from disagg.transceiver.wire.messages.values import Sampling

torch.set_num_threads(1)


def room_for(share: float, longest: int = 60, step: int = 16) -> tuple[int, ...]:
    peaks = peak_slots(LAYOUT, total_tokens=longest, history=0, step_tokens=step)
    return tuple(int(peak * share) + 2 for peak in peaks)


def sampling_of(kind: int, max_tokens: int) -> Sampling:
    return greedy(max_tokens) if kind == 0 else Sampling(max_tokens=max_tokens, seed=kind, temperature=1.0)


def test_sixty_four_requests_over_a_small_pool_all_end_with_their_own_tokens() -> None:
    draw = random.Random(5)
    engine = TestedEngine(num_slots=room_for(2.0), max_num_batched_tokens=16, max_num_seqs=8)
    commands = []
    for number in range(64):
        prompt, sampling = prompt_of(draw.randint(1, 25), number), sampling_of(number % 3, draw.randint(1, 35))
        commands.append(Serve(key(number), prompt, sampling))
    engine.serve_all(commands)
    for command in commands:
        assert engine.tokens(command.key) == reference_tokens(LAYOUT, command.prompt, command.sampling)
        assert isinstance(engine.ending(command.key), FinishedEvent)
    assert engine.stats().num_preemptions > 0
    assert engine.num_used == 0


REQUESTS = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 35), st.integers(0, 2)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=25)
@given(REQUESTS, st.floats(1.0, 2.5), st.integers(8, 30), st.booleans())
def test_any_load_on_any_pool_ends_with_the_tokens_of_an_unloaded_run(
    requests: list[tuple[int, int, int]], share: float, batched_tokens: int, reuses: bool
) -> None:
    hasher = BlockHasher(b"k" * 32, "model") if reuses else None
    engine = TestedEngine(num_slots=room_for(share, 60, 30), max_num_batched_tokens=batched_tokens, hasher=hasher)
    commands = [
        Serve(key(number), prompt_of(length, number), sampling_of(kind, max_tokens))
        for number, (length, max_tokens, kind) in enumerate(requests)
    ]
    engine.serve_all(commands)
    for command in commands:
        assert engine.tokens(command.key) == reference_tokens(LAYOUT, command.prompt, command.sampling)
    assert engine.num_used == 0
    assert not engine.stats().live_keys


@pytest.mark.parametrize("seed", range(3))
def test_a_decode_worker_preempts_received_answers_and_computes_them_itself(seed: int) -> None:
    draw = random.Random(seed)
    source = TestedEngine(role="prefill", num_slots=(200, 300), max_num_batched_tokens=32)
    target = TestedEngine(role="decode", num_slots=room_for(1.6), max_num_batched_tokens=16)
    wanted = {number: (prompt_of(draw.randint(1, 25), number), draw.randint(5, 35)) for number in range(24)}
    waiting, started = list(wanted), set()
    while waiting or target.has_work or len(started) < len(wanted):
        if waiting and draw.random() < 0.7:
            number = waiting.pop(0)
            prompt, max_tokens = wanted[number]
            target.handle(Reserve(key(number), prompt, greedy(max_tokens)))
            source.handle(Prefill(key(number), prompt, greedy(max_tokens)))
            source.handle(Pin(key(number)))
        source.run()
        for number, (prompt, _) in wanted.items():
            if number not in started and target.reserved(key(number)) and draw.random() < 0.5:
                started.add(number)
                target.handle(Decode(key(number), transfer(source, target, key(number), len(prompt))))
                source.handle(Release(key(number)))
        target.step()
    for number, (prompt, max_tokens) in wanted.items():
        assert target.tokens(key(number)) == reference_tokens(LAYOUT, prompt, greedy(max_tokens))
    stats = target.stats()
    assert stats.num_preemptions > 0
    assert stats.prompt_tokens_computed > 0
    assert target.num_used == source.num_used == 0


NARROW = (2 + 60, 2 + 44)
"""Blocks of the full group are short: five answers begin, 17 blocks each takes to its end."""


def crowded(num: int = 6) -> TestedEngine:
    """An engine that has just preempted: answers of 40 tokens grow until the pool is short."""
    engine = TestedEngine(num_slots=NARROW, max_num_batched_tokens=16)
    for number in range(num):
        engine.handle(Serve(key(number), prompt_of(8, number), greedy(40)))
    while not engine.stats().num_preemptions:
        assert engine.has_work
        engine.step()
    return engine


def test_the_newest_gives_way_and_stands_at_the_head_of_the_line() -> None:
    engine = crowded()
    preempted = engine._scheduler._urgent[0]
    running = [s.key for s in engine._scheduler.live.values() if s.cached is not None]
    assert all(int(preempted.key.transfer_id, 16) > int(other.transfer_id, 16) for other in running)
    done = len(engine.tokens(preempted.key))
    assert done > 1
    engine.run()
    assert engine.tokens(preempted.key) == reference_tokens(LAYOUT, preempted.request.prompt, greedy(40))
    assert len(list(engine.of(preempted.key, TokensEvent))) == 40


def test_the_oldest_is_never_preempted() -> None:
    engine = crowded()
    engine.run()
    first = next(e for e in engine.events if isinstance(e, FinishedEvent))
    assert first.key == key(0)


def test_a_preempted_request_can_be_cancelled() -> None:
    engine = crowded()
    preempted = engine._scheduler._urgent[0].key
    engine.handle(Release(preempted))
    engine.run()
    assert not engine.of(preempted, FinishedEvent)
    assert engine.num_used == 0


def test_pinned_prompts_and_reservations_are_never_taken() -> None:
    engine = TestedEngine(num_slots=NARROW, max_num_batched_tokens=16)
    engine.handle(Prefill(key(1), prompt_of(20, 1), greedy(2)))
    engine.handle(Pin(key(1)))
    engine.run()
    held = {unit: engine.bytes_of(unit) for unit in engine.final_units(key(1), 0)}
    for number in range(2, 8):
        engine.handle(Serve(key(number), prompt_of(6, number), greedy(34)))
    engine.run()
    assert engine.stats().num_preemptions > 0
    assert {unit: engine.bytes_of(unit) for unit in held} == held
    assert engine.stats().num_held == 1


def test_a_request_whose_prompt_could_not_be_computed_again_is_promised_all_it_may_need() -> None:
    """Room for the answer but, with chunks of 30, not for its prompt: it is received, and never preempted."""
    decode = peak_slots(LAYOUT, total_tokens=60, history=24, step_tokens=1)
    target = TestedEngine(role="decode", num_slots=tuple(n + 2 for n in decode), max_num_batched_tokens=30)
    source = TestedEngine(role="prefill", max_num_batched_tokens=30)
    prompt = prompt_of(24, 1)
    for number in (1, 2):
        target.handle(Reserve(key(number), prompt, greedy(36)))
        source.handle(Prefill(key(number), prompt, greedy(36)))
        source.handle(Pin(key(number)))
    source.run()
    assert target.reserved(key(2)) is None
    target.handle(Decode(key(1), transfer(source, target, key(1), 24)))
    target.run()
    assert target.tokens(key(1)) == reference_tokens(LAYOUT, prompt, greedy(36))
    assert target.reserved(key(2)) is not None
    assert target.stats().num_preemptions == 0


def test_a_promise_grows_in_every_pool_or_in_none() -> None:
    promises = Promises((2 + 5, 2 + 9))
    assert promises.try_promise("a", (3, 3))
    assert promises.try_promise("b", (1, 1))
    assert not promises.try_grow("a", (5, 4))
    assert promises.of("a") == (3, 3)
    assert promises.try_grow("a", (2, 8))
    assert promises.of("a") == (3, 8)
    promises.check_invariants()
