from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from disagg.loop_lag import BUCKETS, PERIOD_S, CoreWaits, LoopLag

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_stall_counts_as_each_wake_that_it_delayed() -> None:
    lag = LoopLag()
    for _ in range(80):
        lag.note(0.0004)
    lag.note(0.4)
    assert lag.lag.quantile(0.5) == 0.001
    assert lag.lag.quantile(0.99) == 0.5  # 1 of 81 looks, but a fifth of the time
    assert ("disagg_loop_lag_seconds_count", (), 101.0) in lag.samples()


def test_nothing_measured_is_no_lag() -> None:
    assert LoopLag().lag.quantile(0.99) == 0


def test_the_buckets_tell_what_a_handler_may_take_from_what_99_of_100_keep() -> None:
    assert {0.005, 0.05} <= set(BUCKETS)
    assert list(BUCKETS) == sorted(BUCKETS)


def test_an_endless_stall_is_counted_in_bounded_time() -> None:
    lag = LoopLag()
    lag.note(1e6)
    assert lag.lag.quantile(0.5) == float("inf")


async def test_a_held_loop_shows() -> None:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(2 * PERIOD_S)
    time.sleep(0.3)  # noqa: ASYNC251 - the fault that is looked for
    await asyncio.sleep(2 * PERIOD_S)
    task.cancel()
    assert lag.lag.quantile(1) >= 0.25


def test_the_series_are_a_prometheus_histogram() -> None:
    lag, registry = LoopLag(), CollectorRegistry()
    registry.register(lag)
    lag.note(0.003)
    text = generate_latest(registry).decode()
    assert 'disagg_loop_lag_seconds_bucket{le="0.0025"} 0.0' in text
    assert 'disagg_loop_lag_seconds_bucket{le="0.005"} 1.0' in text
    assert "disagg_loop_lag_seconds_count 1.0" in text


def test_what_a_loop_waited_for_a_core_is_late_and_not_held() -> None:
    lag = LoopLag()
    lag.note(0.4, 0.397)
    assert (lag.lag.quantile(1), lag.held.quantile(1)) == (0.5, 0.005)
    lag.note(0.0, 0.015)  # it waited while it was not due
    assert lag.held.quantile(1) == 0.005
    assert ("disagg_loop_held_seconds_count", (), 2.0) in lag.samples()


async def test_a_loop_that_computes_is_held_however_busy_the_machine_is() -> None:
    lag = LoopLag()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(2 * PERIOD_S)
    until = time.thread_time() + 0.3
    while time.thread_time() < until:
        pass
    await asyncio.sleep(2 * PERIOD_S)
    task.cancel()
    assert lag.held.quantile(1) >= 0.25


def test_a_thread_that_shares_its_core_waits_for_it() -> None:
    """Two busy processes on one core: each is ready and unrun for about half of the time."""
    core = min(os.sched_getaffinity(0))
    burn = (
        f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile os.getppid() == {os.getpid()}: pass"
    )
    with subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        waited_s = _waited_s_beside(core)
        other.kill()
    assert waited_s > 0.05


def _waited_s_beside(core: int) -> float:
    before = os.sched_getaffinity(0)
    waits = CoreWaits()
    try:
        os.sched_setaffinity(0, {core})
        began_s, until = waits.total_s(), time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        return waits.total_s() - began_s
    finally:
        os.sched_setaffinity(0, before)
        waits.close()


def test_a_kernel_that_does_not_count_excuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", missing)
    assert CoreWaits().total_s() == 0
