"""Counts of a histogram with fixed edges, as Prometheus wants them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily


class BucketCounts:
    """`edges`: ascending upper edges in seconds; values beyond the last count in a bucket of their own."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = tuple(map(float, edges))
        self._counts = [0] * (len(edges) + 1)
        self.sum_s = 0.0

    @property
    def total(self) -> int:
        return sum(self._counts)

    def note(self, value_s: float, count: int = 1) -> None:
        """`count` observations of one value."""
        self._counts[bisect_left(self._edges, value_s)] += count
        self.sum_s += value_s * count

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper edge, observations up to it) of each bucket; the last edge is `+Inf`."""
        return list(zip([*map(str, self._edges), "+Inf"], accumulate(self._counts), strict=True))

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, documentation)
        family.add_metric([], self.cumulative(), self.sum_s)
        return family
