"""The histogram of times between tokens: noted for many tokens at once, since there is one observation per token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class TokenGaps(Collector):
    def __init__(self, name: str, documentation: str, edges_s: Sequence[float]) -> None:
        self._name, self._documentation, self._edges_s = name, documentation, tuple(edges_s)
        self._counts = [0] * (len(edges_s) + 1)
        self._sum_s = 0.0

    def note(self, gap_s: float, count: int) -> None:
        """`count` tokens came `gap_s` seconds after the one before each."""
        self._counts[bisect_left(self._edges_s, gap_s)] += count
        self._sum_s += gap_s * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation)
        edges = [*map(str, map(float, self._edges_s)), "+Inf"]
        family.add_metric([], list(zip(edges, accumulate(self._counts), strict=True)), self._sum_s)
        yield family
