"""Bytes and blocks of the simulator against the planner's own, over windows, sinks, lengths and what is held."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.cache.window import needed_ordinals
from disagg.simulate.geometry import KvGeometry, runs_in
from disagg.simulate.records import geometry_of
from disagg.transceiver.layout.required import moved_nbytes, required_units

BLOCK = 4


def layout_of(windows: list[tuple[int | None, int]]) -> CacheLayout:
    layers = [LayerSpec(i, window, sinks, 1, 2 + i, "float16", i) for i, (window, sinks) in enumerate(windows)]
    return derive_layout(layers, block_size=BLOCK, max_model_len=1 << 12)


windows = st.lists(st.tuples(st.one_of(st.none(), st.integers(1, 60)), st.integers(0, 9)), min_size=1, max_size=3)


@given(windows, st.integers(1, 200), st.sampled_from((4, 8, 16)))
def test_blocks_that_are_read_are_those_of_the_cache(
    some: list[tuple[int | None, int]], num_tokens: int, size: int
) -> None:
    layout = layout_of(some)
    geometry = KvGeometry(layout, 16)
    for number, group in enumerate(layout.groups):
        mine = [o for first, end in geometry.needed(number, num_tokens, size) for o in range(first, end)]
        assert mine == needed_ordinals(num_tokens, group.window, group.num_sink_tokens, size).tolist()


@given(windows, st.integers(1, 200), st.sampled_from((4, 8, 16)), st.data())
def test_bytes_of_a_handoff_are_the_minimum_of_the_planner(
    some: list[tuple[int | None, int]], num_tokens: int, unit: int, data: st.DataObject
) -> None:
    layout = layout_of(some)
    geometry, ratio = KvGeometry(layout, unit), unit // BLOCK
    whole = st.lists(st.integers(0, num_tokens // unit - 1), unique=True) if num_tokens >= unit else st.just([])
    held = [sorted(data.draw(whole)) for _ in layout.groups]
    blocks = [[unit * ratio + i for unit in units for i in range(ratio)] for units in held]
    groups = geometry_of(layout).groups
    sizes = [layout.slot_nbytes[pool] for pool in layout.pool_of_group]
    required = required_units(groups, num_tokens, BLOCK, blocks)
    runs = [runs_in(units) for units in held]
    assert sum(geometry.moved(num_tokens, runs)) == moved_nbytes(required, sizes)
    start = data.draw(st.integers(0, num_tokens - 1))
    late = [[o for first, n in one.runs for o in range(first, first + n) if o >= start // BLOCK] for one in required]
    assert sum(geometry.moved(num_tokens, runs, start)) == sum(
        len(some) * size for some, size in zip(late, sizes, strict=True)
    )


def test_runs_hold_what_was_given() -> None:
    assert runs_in([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 6), (7, 9))
    assert runs_in([]) == ()
    assert np.array_equal(np.concatenate([np.arange(a, b) for a, b in runs_in([3, 4])]), [3, 4])
