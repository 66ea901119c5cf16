"""A worker measures how fast it computes, by its steps."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disagg.transceiver.peers.link_meter import BusyTime, LinkMeter
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.worker.speeds import StepSpeeds


def warm_speeds() -> StepSpeeds:
    """The first step of either kind is behind it."""
    speeds = StepSpeeds()
    speeds.note(99.0, 7, 0)
    speeds.note(99.0, 0, 1)
    assert speeds.rates == MeasuredRates()
    return speeds


def test_nothing_is_told_before_anything_was_measured() -> None:
    assert StepSpeeds().rates == MeasuredRates()


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 512), min_size=3, max_size=30).filter(lambda sizes: max(sizes) > 4 * min(sizes)),
    step_s=st.floats(0.001, 0.1),
    token_s=st.floats(1e-5, 1e-2),
)
def test_a_steps_own_time_is_told_from_that_of_its_tokens(sizes: list[int], step_s: float, token_s: float) -> None:
    assume(step_s <= 2 * token_s * sum(sizes) / len(sizes))
    speeds = warm_speeds()
    for size in sizes:
        speeds.note(step_s + size * token_s, size, 0)
    assert speeds.rates.prefill_tokens_per_s == pytest.approx(1 / token_s, rel=0.01)
    assert speeds.rates.prompt_step_s == pytest.approx(step_s, rel=0.05, abs=1e-4)


def test_prompt_tokens_are_never_free_however_alike_the_steps_were() -> None:
    speeds = warm_speeds()
    for size, seconds in ((300, 0.1), (100, 0.1), (200, 0.1)):
        speeds.note(seconds, size, 0)
    assert speeds.rates.prompt_step_s == pytest.approx(0.075)
    assert speeds.rates.prefill_tokens_per_s == pytest.approx(200 / 0.025, rel=0.02)


def test_steps_of_one_size_tell_their_tokens_per_second_alone() -> None:
    speeds = warm_speeds()
    for _ in range(5):
        speeds.note(0.5, 100, 0)
    assert speeds.rates.prefill_tokens_per_s == pytest.approx(200)
    assert speeds.rates.prompt_step_s == 0.0
    speeds.note(0.1, 0, 1)
    assert speeds.rates.prompt_step_s == pytest.approx(0.1), "a step of one answer is about as much"
    assert speeds.rates.prefill_tokens_per_s == pytest.approx(100 / 0.4)


def test_steps_of_answers_are_told_by_their_number_and_taken_off_steps_with_prompts_beside_them() -> None:
    speeds = warm_speeds()
    for num_answers, seconds in ((1, 0.01), (2, 0.02), (3, 0.03), (8, 0.08), (9, 0.1)):
        speeds.note(seconds, 0, num_answers)
    assert [count for count, _ in speeds.rates.step_s] == [1, 3, 9], "one for each binary digit of their number"
    assert speeds.rates.step_s[0] == (1, pytest.approx(0.01))
    for size in (100, 300, 500):
        speeds.note(0.01 + size * 0.001, size, 1)
    assert speeds.rates.prefill_tokens_per_s == pytest.approx(1000, rel=0.01)


def test_newer_steps_count_more() -> None:
    speeds = warm_speeds()
    for seconds in (1.0, *[0.1] * 300):
        speeds.note(seconds, 0, 1)
    assert speeds.rates.step_s[0][1] == pytest.approx(0.1, rel=0.05)


def test_a_step_that_computed_nothing_or_took_no_time_is_no_measurement() -> None:
    speeds = warm_speeds()
    speeds.note(1.0, 0, 0)
    speeds.note(0.0, 10, 1)
    assert speeds.rates == MeasuredRates()


def test_a_link_is_as_fast_as_its_last_transfers_and_before_them_as_its_probe() -> None:
    meter = LinkMeter(3.0)
    assert (meter.gb_per_s, meter.latency_s) == (3.0, 0.0)
    meter.note(0, 0.0, 0.5)
    assert meter.gb_per_s == 3.0, "a transfer without bytes says nothing of speed"
    meter.note(2_000_000_000, 2.0, 0.1)
    assert (meter.gb_per_s, meter.latency_s) == pytest.approx((1.0, 0.1))
    for _ in range(100):
        meter.note(1_000_000_000, 0.1, 0.2)
    assert (meter.gb_per_s, meter.latency_s) == pytest.approx((10.0, 0.2), rel=0.01)


def test_time_counts_once_however_many_jobs_run_in_it() -> None:
    busy = BusyTime()
    for now, is_begun in ((0.0, True), (1.0, True), (2.0, False), (4.0, False), (10.0, True), (11.0, False)):
        busy.begin(now) if is_begun else busy.end(now)
    assert busy.seconds == 5.0
