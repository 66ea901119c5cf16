from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from disagg.loop_lag import BUCKETS, PERIOD_S, LoopLag

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_stall_counts_as_each_wake_that_it_delayed() -> None:
    lag = LoopLag()
    for _ in range(80):
        lag.note(0.0004)
    lag.note(0.4)
    assert lag.quantile(0.5) == 0.001
    assert lag.quantile(0.99) == 0.5  # 1 of 81 looks, but a fifth of the time
    assert ("disagg_loop_lag_seconds_count", (), 101.0) in lag.samples()


def test_nothing_measured_is_no_lag() -> None:
    assert LoopLag().quantile(0.99) == 0


def test_the_buckets_tell_what_a_handler_may_take_from_what_99_of_100_keep() -> None:
    assert {0.005, 0.05} <= set(BUCKETS)
    assert list(BUCKETS) == sorted(BUCKETS)


def test_an_endless_stall_is_counted_in_bounded_time() -> None:
    lag = LoopLag()
    lag.note(1e6)
    assert lag.quantile(0.5) == float("inf")


async def test_a_held_loop_shows() -> None:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(2 * PERIOD_S)
    time.sleep(0.3)  # noqa: ASYNC251 - the fault that is looked for
    await asyncio.sleep(2 * PERIOD_S)
    task.cancel()
    assert lag.quantile(1) >= 0.25


def test_the_series_are_a_prometheus_histogram() -> None:
    lag, registry = LoopLag(), CollectorRegistry()
    registry.register(lag)
    lag.note(0.003)
    text = generate_latest(registry).decode()
    assert 'disagg_loop_lag_seconds_bucket{le="0.0025"} 0.0' in text
    assert 'disagg_loop_lag_seconds_bucket{le="0.005"} 1.0' in text
    assert "disagg_loop_lag_seconds_count 1.0" in text
