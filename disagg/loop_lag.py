"""How late a process's event loop wakes its tasks: the watchdog behind `disagg_loop_lag_seconds`.

Whatever holds the loop delays every stream, lease and heartbeat of its process. A task sleeps for a short while over
and over, and notes how much later than asked it was woken. Of that the loop had no core for a time, which the kernel
says: the rest is what this process itself did, `disagg_loop_held_seconds`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from disagg.bucket_counts import BucketCounts

PERIOD_S: Final = 0.02  # 50 looks a second: few enough to cost nothing, enough for a quantile of seconds
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""5 ms is what one handler may take, 50 ms what 99 of 100 wakes keep; the last are times at which workers are lost."""
MAX_MISSED: Final = 1000  # wakes counted for one stall: 20 s, after which the worst bucket says it all


class LagHistogram:
    """Wakes by how late they were. A stall counts as each wake that it delayed: it weighs what it lasted."""

    def __init__(self, name: str, about: str) -> None:
        self.name, self._about = name, about
        self._wakes = BucketCounts(BUCKETS)

    def note(self, lag_s: float) -> None:
        """The loop was `lag_s` late; so were, by less, the wakes that were due meanwhile."""
        for missed in range(min(int(lag_s / PERIOD_S), MAX_MISSED) + 1):
            self._wakes.note(lag_s - missed * PERIOD_S)

    def quantile(self, share: float) -> float:
        """The upper edge of the bucket in which `share` of the wakes lie; infinite beyond the last. 0 of nothing."""
        for edge, count in self._wakes.cumulative():
            if count >= share * self._wakes.total:
                return float(edge) if count else 0.0
        raise AssertionError("the last bucket holds every wake")

    def family(self) -> HistogramMetricFamily:
        return self._wakes.family(self.name, self._about)

    def histogram(self) -> tuple[list[tuple[str, int]], float]:
        """(upper edge, wakes no later) of each bucket, and the sum of all in seconds."""
        return self._wakes.cumulative(), self._wakes.sum_s

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """(name, labels, value) of each series, for a worker's lease."""
        for edge, count in self._wakes.cumulative():
            yield f"{self.name}_bucket", (("le", edge),), float(count)
        yield f"{self.name}_count", (), float(self._wakes.total)
        yield f"{self.name}_sum", (), self._wakes.sum_s


class LoopLag(Collector):
    """Two histograms, filled by `run`: how late the loop was, and how late it was while it had a core."""

    def __init__(self) -> None:
        self.lag = LagHistogram("disagg_loop_lag_seconds", "How late the event loop woke a task")
        self.held = LagHistogram(
            "disagg_loop_held_seconds", "How late the event loop woke a task, less the time that it had no core"
        )

    async def run(self) -> None:
        """Watch the running loop until cancelled."""
        loop, waits = asyncio.get_running_loop(), CoreWaits()
        try:
            while True:
                due, waited_s = loop.time() + PERIOD_S, waits.total_s()
                await asyncio.sleep(PERIOD_S)
                self.note(loop.time() - due, waits.total_s() - waited_s)
        finally:
            waits.close()

    def note(self, lag_s: float, unrun_s: float = 0.0) -> None:
        """The loop was `lag_s` late, and ready without a core for `unrun_s` of this period."""
        self.lag.note(max(0.0, lag_s))
        self.held.note(max(0.0, lag_s - unrun_s))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        return self.lag.family(), self.held.family()

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """(name, labels, value) of each series, for a worker's lease."""
        yield from self.lag.samples()
        yield from self.held.samples()


class CoreWaits:
    """For how long the calling thread was ready to run and had no core, as the kernel's scheduler counts it.

    A kernel that does not count says 0: then nothing excuses a loop.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def total_s(self) -> float:
        """Since the thread began, in seconds. Costs 2 us."""
        if self._fd < 0:
            return 0.0
        return int(os.pread(self._fd, 64, 0).split()[1]) / 1e9  # ns that it ran, ns that it waited, turns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
