"""Steps that overlap: the same tokens as one after another, in any order of events, on a device that computes late."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

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
    Pin,
    Prefill,
    PromptComputedEvent,
    Release,
    Reserve,
    ReservedEvent,
    Serve,
    UnitsFinalEvent,
)
from disagg.engine.engine import EngineConfig
from disagg.transceiver.wire.messages.values import Sampling

torch.set_num_threads(1)

CHUNK = 12


def room_for(share: float, longest: int = 60) -> tuple[int, ...]:
    peaks = peak_slots(LAYOUT, total_tokens=longest, history=0, step_tokens=CHUNK)
    return tuple(int(peak * share) + 2 for peak in peaks)


def engine(steps_ahead: int = 1, **others: Any) -> TestedEngine:
    return TestedEngine(steps_ahead=steps_ahead, **{"max_num_batched_tokens": CHUNK, **others})


SAMPLINGS: dict[str, Callable[[int], Sampling]] = {
    "greedy": greedy,
    "drawn": lambda n: Sampling(max_tokens=n, temperature=1.0, seed=n),
    "stopping": lambda n: greedy(n, stop_token_ids=tuple(range(0, 40, 5))),
    "not before": lambda n: greedy(n, eos_token_ids=tuple(range(0, 40, 3)), min_tokens=n // 2),
    "penalised": lambda n: Sampling(
        max_tokens=n, temperature=1.0, repetition_penalty=1.7, frequency_penalty=0.9, presence_penalty=0.4, seed=n
    ),
    "biased": lambda n: greedy(n, logit_bias=((3, 4.0), (5, 4.0)), frequency_penalty=2.0),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_answers_equal_those_of_steps_one_after_another(kind: str) -> None:
    commands = [Serve(key(n), prompt_of(3 + 5 * n, n), SAMPLINGS[kind](4 + 3 * n)) for n in range(6)]
    ahead = engine()
    ahead.serve_all(commands)
    for command in commands:
        assert ahead.tokens(command.key) == reference_tokens(LAYOUT, command.prompt, command.sampling)
    assert ahead.num_used == 0
    assert not ahead.has_work


def test_the_host_works_while_the_device_computes() -> None:
    def seconds(steps_ahead: int) -> float:
        served = engine(steps_ahead)
        served.serve_all([Serve(key(n), prompt_of(3, n), greedy(40)) for n in range(4)])
        return served.device.now

    one_by_one, overlapped = seconds(0), seconds(1)
    assert one_by_one >= 2 * 40, "a second of each for every token"
    assert overlapped <= 0.55 * one_by_one


def test_a_length_that_ends_an_answer_is_foreseen_and_nothing_is_computed_for_it() -> None:
    served = engine()
    served.serve_all([Serve(key(n), prompt_of(4, n), greedy(5 + n)) for n in range(3)])
    assert served.stats().num_dropped == 0


def test_a_stop_found_late_drops_one_token_that_is_never_told() -> None:
    prompt, plain = prompt_of(6), greedy(20)
    expected = reference_tokens(LAYOUT, prompt, plain)
    stop = next(i for i, token in enumerate(expected) if i >= 3 and token not in expected[:i])
    served = engine()
    served.serve_all([Serve(key(1), prompt, greedy(20, stop_token_ids=(expected[stop],)))])
    assert served.tokens(key(1)) == expected[: stop + 1]
    assert served.stats().num_dropped == 1
    assert served.num_used == 0


def test_a_token_that_is_not_known_is_never_read_by_the_host() -> None:
    served = engine()
    served.handle(Serve(key(1), prompt_of(4), greedy(8)))
    served.step()
    with pytest.raises(AssertionError, match="not computed"):
        served._flight.drawn.token_ids.get()  # type: ignore[union-attr,attr-defined]


def test_a_cancel_while_its_step_is_under_way_leaves_nothing_behind() -> None:
    served = engine()
    other = Serve(key(2), prompt_of(9, 2), greedy(12))
    served.handle(Serve(key(1), prompt_of(4), greedy(20)))
    served.handle(other)
    for _ in range(4):
        served.step()
    told = len(served.tokens(key(1)))
    served.handle(Release(key(1)))
    served.run()
    assert len(served.tokens(key(1))) == told
    assert served.tokens(key(2)) == reference_tokens(LAYOUT, other.prompt, other.sampling)
    assert served.stats().num_dropped == 1
    assert served.num_used == 0


def test_the_same_attempt_begun_anew_is_not_taken_for_the_one_under_way() -> None:
    served = engine(role="prefill")
    prompt = prompt_of(9)
    served.handle(Prefill(key(1), prompt, greedy(3)))
    served.step()
    served.handle(DropSoft(key(1)))
    served.handle(Pin(key(1)))  # begins again while its first computation is under way
    served.run()
    (computed,) = served.of(key(1), PromptComputedEvent)
    assert isinstance(computed, PromptComputedEvent)
    assert computed.compute_id == 1
    assert computed.first_token.token_id == reference_tokens(LAYOUT, prompt, greedy(1))[0]
    assert served.stats().num_dropped == 1


def test_a_reservation_is_told_of_its_slots_when_the_step_under_way_was_read() -> None:
    served = engine(role="decode")
    served.handle(Serve(key(1), prompt_of(4), greedy(20)))
    served.step()
    assert not served.handle(Reserve(key(2), prompt_of(9), greedy(3)))
    assert [type(event) for event in served.step()].count(ReservedEvent) == 1
    served.handle(Reserve(key(3), prompt_of(9), greedy(3)))
    served.handle(Release(key(3)))
    assert not any(isinstance(event, ReservedEvent) for event in served.step()), "it is reserved no more"


def test_a_reservation_told_at_once_would_be_written_by_the_step_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: its slots were those of an answer that was released while its step was under way."""
    source, target = TestedEngine(role="prefill"), engine(role="decode", num_slots=room_for(1.0, 24))
    prompt = prompt_of(12)
    source.handle(Prefill(key(2), prompt, greedy(6)))
    source.run()
    target.handle(Serve(key(1), prompt_of(4), greedy(20)))
    for _ in range(10):
        target.step()
    target.handle(Release(key(1)))
    monkeypatch.setattr(target, "_told_in_time", list)
    (reserved,) = target.handle(Reserve(key(2), prompt, greedy(6)))
    assert isinstance(reserved, ReservedEvent)
    target.handle(Decode(key(2), transfer(source, target, key(2), len(prompt))))
    target.run()
    assert target.tokens(key(2)) != reference_tokens(LAYOUT, prompt, greedy(6))


def test_blocks_are_told_final_only_when_the_step_that_fills_them_was_read() -> None:
    source = engine(role="prefill")
    source.handle(Prefill(key(1), prompt_of(9), greedy(4)))
    source.step()
    assert not source.of(key(1), UnitsFinalEvent), "the device has not written them"
    source.run()
    assert source.final_units(key(1), 0)


def test_logits_that_are_not_finite_end_the_request_whose_next_step_is_under_way() -> None:
    prompt = prompt_of(5)
    poison = reference_tokens(LAYOUT, prompt, greedy(4))[3]
    served = engine(poison=poison)
    served.serve_all([Serve(key(1), prompt, greedy(20))])
    assert isinstance(served.ending(key(1)), FailedEvent)
    served.device.idle()
    assert all(torch.isfinite(served.cache.group_view(g)).all() for g in range(LAYOUT.num_groups))
    assert served.num_used == 0


REQUESTS = st.lists(
    st.tuples(st.integers(1, 25), st.integers(1, 30), st.sampled_from(sorted(SAMPLINGS)), st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=20)
@given(REQUESTS, st.randoms(use_true_random=False), st.floats(1.0, 2.5), st.booleans(), st.sampled_from(["off", "on"]))
def test_any_order_of_arrivals_cancels_and_preemptions_gives_the_tokens_of_a_model_without_blocks(
    requests: list[tuple[int, int, str, int]], draw: random.Random, share: float, reuses: bool, scratch: str
) -> None:
    served = engine(num_slots=room_for(share), hasher=HASHER if reuses else None, swa_scratch=scratch)
    served.device.host_s, served.device.device_s = draw.choice([(1, 0.1), (0.1, 1), (1, 1)])
    waiting = [
        Serve(key(n), prompt_of(length, stem), SAMPLINGS[kind](max_tokens))
        for n, (length, max_tokens, kind, stem) in enumerate(requests)
    ]
    commands, cancelled = {command.key: command for command in waiting}, set()
    while waiting or served.has_work:
        chance = draw.random()
        if waiting and chance < 0.4:
            served.handle(waiting.pop(0))
        elif chance < 0.45 and served.stats().live_keys:
            cancelled.add(draw.choice(served.stats().live_keys))
            served.handle(Release(sorted(cancelled)[-1]))
        else:
            served.step()
    for wanted, command in commands.items():
        expected = reference_tokens(LAYOUT, command.prompt, command.sampling)
        found = served.tokens(wanted)
        assert found == expected or (wanted in cancelled and found == expected[: len(found)])
    assert served.num_used == 0
    assert not served.stats().live_keys


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 1 << 20), st.booleans())
def test_transfers_between_engines_that_run_ahead_give_the_same_tokens(seed: int, reuses: bool) -> None:
    draw = random.Random(seed)
    hasher = HASHER if reuses else None
    source = engine(role="prefill", num_slots=(200, 300), hasher=hasher)
    target = engine(role="decode", num_slots=room_for(1.6), hasher=hasher)
    wanted = {n: (prompt_of(draw.randint(1, 25), n % 3), draw.randint(2, 30)) for n in range(12)}
    waiting, started = list(wanted), set()
    while waiting or target.has_work or len(started) < len(wanted):
        if waiting and draw.random() < 0.6:
            n = waiting.pop(0)
            target.handle(Reserve(key(n), wanted[n][0], greedy(wanted[n][1])))
            source.handle(Prefill(key(n), wanted[n][0], greedy(wanted[n][1])))
            source.handle(Pin(key(n)))
        source.step() if draw.random() < 0.7 else None
        for n, (prompt, _) in wanted.items():
            if n not in started and target.reserved(key(n)) and source.computed(key(n)) and draw.random() < 0.5:
                started.add(n)
                target.handle(Decode(key(n), transfer(source, target, key(n), len(prompt))))
                source.handle(Release(key(n)))
        target.step()
    for n, (prompt, max_tokens) in wanted.items():
        assert target.tokens(key(n)) == reference_tokens(LAYOUT, prompt, greedy(max_tokens))
    source.run()
    assert target.num_used == source.num_used == 0


def test_a_depth_that_no_device_has_is_refused() -> None:
    with pytest.raises(ValueError, match="steps ahead: 2, expected 0 or 1"):
        EngineConfig("both", 8, 16, 200, steps_ahead=2)
