"""How far a prefix can be fetched, against an oracle that walks tokens and candidates one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.transceiver.layout.boundary import common_boundary, missing_at, ordinals_of
from disagg.transceiver.wire.messages.values import GroupRuns


@dataclass(frozen=True)
class Window:
    window: int | None
    num_sink_tokens: int


@dataclass(frozen=True)
class Case:
    groups: tuple[Window, ...]
    limit: int
    source_size: int
    sink_size: int
    known: int
    """Blocks of the source's chain that its tree knows."""
    source: tuple[frozenset[int], ...]
    sink: tuple[frozenset[int], ...]


def is_attended(token: int, boundary: int, group: Window) -> bool:
    """By a query at the boundary or behind it."""
    return group.window is None or token < group.num_sink_tokens or token >= boundary - group.window + 1


def oracle_missing(case: Case, boundary: int) -> list[set[int]]:
    """Per group, tokens that are needed and that the sink has not."""
    return [
        {
            token
            for token in range(boundary)
            if is_attended(token, boundary, group) and token // case.sink_size not in case.sink[number]
        }
        for number, group in enumerate(case.groups)
    ]


def oracle_boundary(case: Case) -> int:
    coarser = max(case.source_size, case.sink_size)
    for boundary in range(case.limit // coarser * coarser, 0, -coarser):
        missing = oracle_missing(case, boundary)
        held = [{t // case.source_size for t in tokens} for tokens in missing]
        if all(blocks <= source for blocks, source in zip(held, case.source, strict=True)):
            return boundary if any(missing) else 0
    return 0


def oracle_units(case: Case, boundary: int) -> list[set[int]]:
    unit = min(case.source_size, case.sink_size)
    return [{token // unit for token in tokens} for tokens in oracle_missing(case, boundary)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (4, 2), (2, 4), (8, 2), (2, 8), (6, 3), (1, 4)]))
    windows = st.builds(Window, st.none() | st.integers(1, 24), st.sampled_from([0, 0, 1, 5]))
    groups = tuple(draw(st.lists(windows, min_size=1, max_size=3)))
    limit = draw(st.integers(0, 10)) * max(sizes)
    known = draw(st.integers(0, limit // sizes[0]))
    density = draw(st.sampled_from(["all", "most", "some"]))

    def blocks(count: int) -> frozenset[int]:
        if density == "all":
            return frozenset(range(count))
        gaps = draw(st.sets(st.integers(0, max(0, count - 1)), max_size=2 if density == "most" else count))
        return frozenset(range(count)) - gaps

    source = tuple(blocks(known) for _ in groups)
    held = tuple(draw(st.frozensets(st.integers(0, max(0, limit // sizes[1] - 1)), max_size=12)) for _ in groups)
    sink = tuple(frozenset(o for o in some if o < limit // sizes[1]) for some in held)
    return Case(groups, limit, *sizes, known, source, sink)


def boundary_of(case: Case) -> int:
    resident = [np.array([o in blocks for o in range(case.known)], dtype=np.bool_) for blocks in case.source]
    held = [sorted(blocks) for blocks in case.sink]
    return common_boundary(case.groups, case.limit, resident, case.source_size, held, case.sink_size)


def as_sets(runs: Sequence[GroupRuns], num_groups: int) -> list[set[int]]:
    return [set(ordinals.tolist()) for ordinals in ordinals_of(runs, num_groups)]


@given(cases())
@settings(max_examples=400)
def test_the_boundary_is_the_largest_that_both_ends_hold_together(case: Case) -> None:
    assert boundary_of(case) == oracle_boundary(case)


@given(cases(), st.integers(0, 10))
@settings(max_examples=200)
def test_what_moves_is_what_is_needed_and_not_held_token_by_token(case: Case, blocks: int) -> None:
    boundary = min(blocks * max(case.source_size, case.sink_size), case.limit)
    unit = min(case.source_size, case.sink_size)
    held = [sorted(ordinals) for ordinals in case.sink]
    missing = missing_at(case.groups, boundary, unit, held, case.sink_size)
    assert as_sets(missing, len(case.groups)) == oracle_units(case, boundary)
    assert all(entry.runs for entry in missing)


def test_where_the_sink_has_all_that_the_source_has_nothing_moves() -> None:
    full = Case((Window(None, 0),), 16, 4, 4, 4, (frozenset(range(4)),), (frozenset(range(4)),))
    assert boundary_of(full) == 0


@pytest.mark.parametrize(("sizes", "boundary"), [((4, 2), 12), ((2, 4), 12), ((8, 2), 8), ((2, 8), 8)])
def test_a_boundary_fills_whole_blocks_of_both_ends(sizes: tuple[int, int], boundary: int) -> None:
    known = 14 // sizes[0]
    case = Case((Window(None, 0),), 16, *sizes, known, (frozenset(range(known)),), (frozenset(),))
    assert boundary_of(case) == boundary


def test_a_block_that_only_the_sink_has_fills_a_gap_of_the_source() -> None:
    case = Case((Window(None, 0),), 16, 4, 4, 4, (frozenset({0, 2, 3}),), (frozenset({1}),))
    assert boundary_of(case) == 16
    without = Case((Window(None, 0),), 16, 4, 4, 4, (frozenset({0, 2, 3}),), (frozenset(),))
    assert boundary_of(without) == 4


def test_of_a_window_only_what_is_read_behind_the_boundary_is_needed() -> None:
    windowed = Case((Window(4, 0),), 16, 4, 4, 4, (frozenset({3}),), (frozenset(),))
    assert boundary_of(windowed) == 16
    assert as_sets(missing_at(windowed.groups, 16, 4, [()], 4), 1) == [{3}]
