"""The histogram of gaps between tokens, against prometheus_client's own, which is told of one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from disagg.router.token_gaps import TokenGaps

EDGES_S = (0.001, 0.25, 1.0, 30.0)
GAPS = st.one_of(st.sampled_from((0.0, *EDGES_S)), st.floats(0, 60))  # an edge belongs to the bucket that it ends


def plain(notes: Sequence[tuple[float, int]]) -> CollectorRegistry:
    registry = CollectorRegistry()
    histogram = Histogram("gaps_seconds", "Between tokens", buckets=EDGES_S, registry=registry)
    for gap_s, count in notes:
        for _ in range(count):
            histogram.observe(gap_s)
    return registry


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    found = [sample for family in registry.collect() for sample in family.samples]
    return {(one.name, one.labels.get("le", "")): one.value for one in found if not one.name.endswith("_created")}


@given(st.lists(st.tuples(GAPS, st.integers(1, 20)), max_size=20))
def test_it_counts_as_a_plain_histogram_does(notes: list[tuple[float, int]]) -> None:
    gaps, registry = TokenGaps("gaps_seconds", "Between tokens", EDGES_S), CollectorRegistry()
    for gap_s, count in notes:
        gaps.note(gap_s, count)
    registry.register(gaps)
    found, expected = samples(registry), samples(plain(notes))
    assert found.pop(("gaps_seconds_sum", "")) == pytest.approx(expected.pop(("gaps_seconds_sum", "")))
    assert found == expected
    assert len(found) == len(EDGES_S) + 2, "each edge, infinity and the count"


def test_it_is_shown_as_a_plain_histogram_is() -> None:
    gaps, registry = TokenGaps("gaps_seconds", "Between tokens", EDGES_S), CollectorRegistry()
    gaps.note(0.5, 3)
    registry.register(gaps)
    expected = [line for line in generate_latest(plain([(0.5, 3)])).splitlines() if b"_created" not in line]
    assert generate_latest(registry).splitlines() == expected
