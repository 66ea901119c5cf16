"""How late a process's event loop wakes its tasks: the watchdog behind `disagg_loop_lag_seconds`.

Whatever holds the loop delays every stream, lease and heartbeat of its process. A task sleeps for a short while over
and over, and notes how much later than asked it was woken.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

NAME: Final = "disagg_loop_lag_seconds"
PERIOD_S: Final = 0.02  # 50 looks a second: few enough to cost nothing, enough for a quantile of seconds
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""5 ms is what one handler may take, 50 ms what 99 of 100 wakes keep; the last are times at which workers are lost."""
MAX_MISSED: Final = 1000  # wakes counted for one stall: 20 s, after which the worst bucket says it all


class LoopLag(Collector):
    """The histogram, filled by `run`. A stall counts as each wake that it delayed: it weighs what it lasted."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum_s = 0.0

    async def run(self) -> None:
        """Watch the running loop until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            self.note(max(0.0, loop.time() - due))

    def note(self, lag_s: float) -> None:
        """The loop was `lag_s` late; so were, by less, the wakes that were due meanwhile."""
        for missed in range(min(int(lag_s / PERIOD_S), MAX_MISSED) + 1):
            late_s = lag_s - missed * PERIOD_S
            self._counts[bisect_left(BUCKETS, late_s)] += 1
            self._sum_s += late_s

    def quantile(self, share: float) -> float:
        """The upper edge of the bucket in which `share` of the wakes lie; infinite beyond the last. 0 of nothing."""
        for edge, count in self._cumulative():
            if count >= share * sum(self._counts):
                return float(edge) if count else 0.0
        raise AssertionError("the last bucket holds every wake")

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(NAME, "How late the event loop woke a task")
        family.add_metric([], list(self._cumulative()), self._sum_s)
        yield family

    def histogram(self) -> tuple[list[tuple[str, int]], float]:
        """(upper edge, wakes no later) of each bucket, and the sum of all in seconds."""
        return list(self._cumulative()), self._sum_s

    def samples(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """(name, labels, value) of each series, for a worker's lease."""
        for edge, count in self._cumulative():
            yield f"{NAME}_bucket", (("le", edge),), float(count)
        yield f"{NAME}_count", (), float(sum(self._counts))
        yield f"{NAME}_sum", (), self._sum_s

    def _cumulative(self) -> Iterator[tuple[str, int]]:
        total = 0
        for edge, count in zip([*map(str, BUCKETS), "+Inf"], self._counts, strict=True):
            total += count
            yield edge, total
