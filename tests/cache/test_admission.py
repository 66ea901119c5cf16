from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.cache_oracle import resident_blocks, tiny_layout

from disagg.cache.admission import Promises, peak_slots


def observed_peak(layout, total, history, step):
    """Walk a sequence to its end, `step` tokens at a time, and keep the most it held per pool."""
    most = [0] * layout.num_pools
    while True:
        capacity = min(history + step, total)
        now = [0] * layout.num_pools
        for group, pool in zip(layout.groups, layout.pool_of_group, strict=True):
            now[pool] += len(resident_blocks(capacity, history, group, layout.block_size))
        most = [max(pair) for pair in zip(most, now, strict=True)]
        if capacity == total:
            return tuple(most)
        history = capacity


@settings(deadline=None, max_examples=80)
@given(
    total=st.integers(1, 60),
    share=st.floats(0, 1),
    step=st.integers(1, 20),
    block_size=st.integers(1, 6),
    window=st.integers(1, 20),
    sinks=st.integers(0, 7),
)
def test_no_walk_holds_more_than_the_promised_peak(total, share, step, block_size, window, sinks):
    layout = tiny_layout(window, window, None, block_size=block_size, num_sink_tokens=sinks)
    history = int(total * share)
    peaks = peak_slots(layout, total_tokens=total, history=history, step_tokens=step)
    observed = observed_peak(layout, total, history, step)
    assert all(o <= p for o, p in zip(observed, peaks, strict=True))


def test_the_peak_of_a_window_is_reached():
    layout = tiny_layout(8, block_size=4)
    assert peak_slots(layout, total_tokens=100, history=0, step_tokens=1) == (3,) == observed_peak(layout, 100, 0, 1)


def test_a_received_prompt_needs_no_room_for_what_was_never_allocated():
    layout = tiny_layout(8, 8, None, block_size=4)
    assert peak_slots(layout, total_tokens=101, history=100, step_tokens=1) == (3, 26)
    assert peak_slots(layout, total_tokens=101, history=0, step_tokens=64) == (19, 26)


def test_a_promise_is_given_by_every_pool_or_by_none():
    promises = Promises((2 + 4, 2 + 9))
    assert promises.try_promise("a", (3, 3))
    assert not promises.try_promise("b", (2, 3))
    assert promises.promised == (3, 3)
    assert promises.try_promise("b", (1, 6))
    assert not promises.try_promise("c", (0, 1))
    promises.release("a")
    promises.release("a")
    assert promises.try_promise("c", (3, 3))
    promises.check_invariants()


def test_a_promise_shrinks_but_never_grows():
    promises = Promises((10, 10))
    promises.try_promise("a", (5, 5))
    promises.shrink("a", (2, 8))
    assert promises.promised == (2, 5)


def test_what_an_empty_pool_cannot_hold_is_told_apart_from_what_must_wait():
    promises = Promises((2 + 4,))
    assert promises.try_promise("a", (4,))
    assert promises.fits_empty((4,))
    assert not promises.fits_empty((5,))


def test_promising_twice_is_our_own_fault():
    promises = Promises((10,))
    promises.try_promise("a", (1,))
    with pytest.raises(AssertionError):
        promises.try_promise("a", (1,))
