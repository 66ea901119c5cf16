from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles.cache_oracle import needed_blocks, readable_later

from disagg.cache.window import live_slots_bound, needed_ordinals, sink_blocks, stale_range

WINDOWS = st.one_of(st.none(), st.integers(1, 40))
SINKS = st.integers(0, 12)
BLOCKS = st.integers(1, 9)


@pytest.mark.parametrize(
    ("history", "num_sinks", "expected"),
    [(1024, 0, range(28)), (1023, 0, range(28)), (1022, 0, range(27)), (1024, 32, range(1, 28))],
)
def test_the_stale_range_agrees_with_the_published_vectors(history, num_sinks, expected):
    assert stale_range(history, 128, num_sinks, 32) == expected


@pytest.mark.parametrize(("window", "block_size", "expected"), [(128, 32, 5), (8, 8, 2), (1, 8, 1), (1024, 32, 33)])
def test_the_live_bound_agrees_with_the_published_vectors(window, block_size, expected):
    assert live_slots_bound(window, 0, block_size) == expected


def test_full_attention_is_never_stale():
    assert len(stale_range(10_000, None, 7, 16)) == 0


@given(st.integers(0, 120), WINDOWS, SINKS, BLOCKS)
def test_a_block_is_stale_exactly_when_no_later_query_reads_a_token_of_it(history, window, sinks, block_size):
    stale = stale_range(history, window, sinks, block_size)
    for block in range(history // block_size + 1):
        tokens = range(block * block_size, (block + 1) * block_size)
        read = any(readable_later(t, history, window, sinks) for t in tokens)
        assert (block in stale) == (not read)


@given(st.integers(0, 80), st.integers(0, 20), WINDOWS, SINKS, BLOCKS)
def test_the_stale_range_only_grows(history, step, window, sinks, block_size):
    assert set(stale_range(history, window, sinks, block_size)) <= set(
        stale_range(history + step, window, sinks, block_size)
    )


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 16])
def test_the_live_bound_is_reached_and_never_passed(window, step, block_size):
    most = 0
    for history in range(4 * (window + step + block_size)):
        blocks = -(-(history + step) // block_size)
        most = max(most, blocks - len(stale_range(history, window, 0, block_size)))
    assert most == live_slots_bound(window, 0, block_size, step)


@given(st.integers(1, 120), WINDOWS, SINKS, BLOCKS)
def test_needed_ordinals_are_those_a_token_walk_finds(prompt_len, window, sinks, block_size):
    needed = needed_ordinals(prompt_len, window, sinks, block_size)
    assert needed.dtype == np.int64
    assert needed.tolist() == needed_blocks(prompt_len, window, sinks, block_size)


@given(st.integers(1, 120), WINDOWS, SINKS, BLOCKS)
def test_a_needed_block_is_never_stale_while_the_prompt_is_computed(prompt_len, window, sinks, block_size):
    needed = set(needed_ordinals(prompt_len, window, sinks, block_size).tolist())
    for history in range(prompt_len + 1):
        assert needed.isdisjoint(stale_range(history, window, sinks, block_size))


@pytest.mark.parametrize(
    ("prompt_len", "block_size", "window", "expected"),
    [
        (32, 8, None, [0, 1, 2, 3]),
        (32, 8, 16, [2, 3]),
        (32, 8, 24, [1, 2, 3]),
        (32, 8, 32, [0, 1, 2, 3]),
        (17, 8, None, [0, 1, 2]),
        (16, 8, None, [0, 1]),
        (1024, 32, 128, [28, 29, 30, 31]),
    ],
)
def test_needed_ordinals_agree_with_the_slice_vectors(prompt_len, block_size, window, expected):
    assert needed_ordinals(prompt_len, window, 0, block_size).tolist() == expected


def test_sinks_that_upstream_loses_are_needed():
    assert needed_ordinals(1024, 128, 32, 32).tolist() == [0, 28, 29, 30, 31]


def test_sink_blocks_round_up():
    assert [sink_blocks(s, 4) for s in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_an_off_by_one_window_is_noticed_by_the_oracle():
    differing = [p for p in range(1, 60) if needed_ordinals(p, 9, 0, 4).tolist() != needed_blocks(p, 8, 0, 4)]
    assert differing
