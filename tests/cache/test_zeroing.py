"""What a slot holds when it is allocated: zeros where anything of it may be read before it is stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles.cache_oracle import needed_blocks, tiny_layout

from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.layout import CacheLayout
from disagg.cache.pool import SlotPool
from disagg.cache.slot_memory import SlotMemory
from disagg.cache.table import HOLE

GARBAGE = 0xFF  # NaN in every float format
SIZE = 8
LAYOUT = tiny_layout(5, 13, None, block_size=SIZE, num_sink_tokens=3)
SCRATCH_LAYOUT = CacheLayout(**{**{f: getattr(LAYOUT, f) for f in LAYOUT.__slots__}, "uses_scratch": True})


def used_cache(layout: CacheLayout = LAYOUT) -> KVCache:
    """Every slot held something before."""
    cache = KVCache(layout, [60] * layout.num_pools)
    for pool in cache.pools:
        slots = pool.allocate(pool.num_free)
        pool.memory[slots] = GARBAGE
        pool.free(slots)
    return cache


def store(cache: KVCache, sequence: CachedSequence, group: int, tokens: range) -> None:
    view, table = cache.group_view(group), sequence.tables[group]
    for token in tokens:
        if (slot := table[token // SIZE]) != HOLE:
            view[slot, :, :, :, token % SIZE] = 1.0


def is_finite(cache: KVCache, sequence: CachedSequence, group: int) -> bool:
    table = sequence.tables[group]
    return bool(cache.group_view(group)[table[table != HOLE]].isfinite().all())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_whatever_a_step_may_read_is_finite(steps: list[int]) -> None:
    cache, end = used_cache(), 0
    sequence = cache.open("a")
    for count in steps:
        start, end = end, end + count
        assert cache.resize(sequence, capacity=end, history=start)
        for group in range(LAYOUT.num_groups):
            store(cache, sequence, group, range(start, end))
            assert is_finite(cache, sequence, group)
    cache.close()


@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8]))
def test_whatever_is_read_after_a_transfer_is_finite(prompt_len: int, unit: int) -> None:
    """A sender of smaller blocks brings the units that hold a token which is read later, and no others."""
    cache = used_cache()
    sequence = cache.open("a")
    assert cache.reserve(sequence, [7] * prompt_len, capacity=prompt_len + 1) is not None
    for number, group in enumerate(LAYOUT.groups):
        for ordinal in needed_blocks(prompt_len, group.window, group.num_sink_tokens, unit):
            store(cache, sequence, number, range(ordinal * unit, min((ordinal + 1) * unit, prompt_len)))
        assert is_finite(cache, sequence, number)
    cache.close()


def test_what_a_step_or_a_transfer_fills_is_not_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    zeroed: list[int] = []
    monkeypatch.setattr(SlotMemory, "zero", lambda self, slots: zeroed.extend(slots))
    cache = KVCache(tiny_layout(None, block_size=SIZE), (60,))
    computed, received = cache.open("computed"), cache.open("received")
    assert cache.resize(computed, capacity=3 * SIZE, history=0)
    assert cache.reserve(received, [7] * 3 * SIZE, capacity=3 * SIZE)
    assert not zeroed
    assert cache.resize(computed, capacity=3 * SIZE + 1, history=3 * SIZE)
    assert zeroed == [computed.tables[0][3]]
    cache.close()


@pytest.mark.parametrize("begins_at", [0, SIZE + 1])
def test_scratch_slots_are_not_zeroed(begins_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(SCRATCH_LAYOUT, [60] * SCRATCH_LAYOUT.num_pools)
    sequence, zeroed = cache.open("a"), set[int]()
    assert cache.resize(sequence, capacity=begins_at, history=0)
    monkeypatch.setattr(SlotMemory, "zero", lambda self, slots: zeroed.update(slots.tolist()))
    assert cache.resize(sequence, capacity=80, history=begins_at, scratch_until=80)
    scratch = {slot for one in sequence.scratch if one is not None for slot in one.slots}
    assert scratch
    assert not scratch & zeroed
    cache.close()


def test_a_cache_that_zeroed_nothing_would_hand_out_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr(SlotMemory, "zero", lambda self, slots: None)
    cache = used_cache()
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=SIZE + 1, history=0)
    store(cache, sequence, 2, range(SIZE + 1))
    assert not is_finite(cache, sequence, 2)
    cache.close()


def test_a_pool_zeroes_all_but_what_it_is_told_will_be_overwritten() -> None:
    pool = SlotPool(64, 10)
    slots = pool.allocate(8)
    pool.memory[slots] = GARBAGE
    pool.free(slots)
    taken = pool.allocate(3, overwritten=np.array([True, False, True]))
    assert [bool(pool.memory[slot].any()) for slot in taken] == [True, False, True]
    pool.check_invariants()
    pool.close()
