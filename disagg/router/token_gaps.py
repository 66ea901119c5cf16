"""The histogram of times between tokens: noted for many tokens at once, since there is one observation per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from disagg.bucket_counts import BucketCounts


class TokenGaps(Collector):
    def __init__(self, name: str, documentation: str, edges_s: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._gaps = BucketCounts(edges_s)

    def note(self, gap_s: float, count: int) -> None:
        """`count` tokens came `gap_s` seconds after the one before each."""
        self._gaps.note(gap_s, count)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        yield self._gaps.family(self._name, self._documentation)
