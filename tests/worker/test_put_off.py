from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.worker.put_off import FIRST_LATENCY_S, SHARE_OF_COMPUTING, TIMES_ESTIMATE, PutOff

FAST, SLOW = MeasuredRates(1e6), MeasuredRates(1000.0, 0.5)


def test_a_prompt_waits_twice_the_estimated_transfer() -> None:
    assert PutOff().limit_s(10**9, 2.0, 100_000, SLOW) == pytest.approx(TIMES_ESTIMATE * (0.5 + FIRST_LATENCY_S))


def test_a_prompt_waits_a_quarter_of_its_computing_at_most() -> None:
    assert PutOff().limit_s(10**9, 2.0, 2000, SLOW) == pytest.approx(SHARE_OF_COMPUTING * 2.5)


def test_a_transfer_that_computing_outruns_is_not_waited_for() -> None:
    assert PutOff().limit_s(10**9, 2.0, 1000, FAST) == 0.0
    assert PutOff().limit_s(10**9, 2.0, 1500, SLOW) == 0.0, "a quarter of 2 s is less than 0.52 s"


def test_of_unknown_rates_the_transfer_decides() -> None:
    assert PutOff().limit_s(0, 0.0, 10, MeasuredRates()) == pytest.approx(TIMES_ESTIMATE * FIRST_LATENCY_S)


def test_what_transfers_took_beside_their_bytes_is_learned() -> None:
    put_off = PutOff()
    for _ in range(60):
        put_off.note(0.105, 10**8, 1.0)
    assert put_off.limit_s(0, 1.0, 10, MeasuredRates()) == pytest.approx(TIMES_ESTIMATE * 0.005, rel=0.01)


@given(
    nbytes=st.integers(0, 10**12),
    speed=st.floats(0, 100),
    count=st.integers(1, 10**6),
    rate=st.floats(0, 1e7, allow_subnormal=False),
    took=st.floats(0, 100),
)
def test_no_prompt_waits_longer_than_both_bounds(
    nbytes: int, speed: float, count: int, rate: float, took: float
) -> None:
    put_off = PutOff()
    put_off.note(took, nbytes, speed)
    limit = put_off.limit_s(nbytes, speed, count, MeasuredRates(rate))
    assert limit >= 0
    if rate > 0:
        assert limit <= SHARE_OF_COMPUTING * count / rate * 1.0001
