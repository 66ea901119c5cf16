from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.oracles.cache_oracle import resident_blocks, tiny_layout

from disagg.cache.cache import KVCache
from disagg.cache.table import HOLE


def snapshot(cache, sequence):
    tables = tuple(table.tolist() for table in sequence.tables)
    return tables, sequence.capacity, sequence.history, cache.usage(), [p.generations.tolist() for p in cache.pools]


def held(sequence, group):
    return set(np.flatnonzero(sequence.tables[group] != HOLE).tolist())


def test_declaring_the_history_first_never_allocates_what_will_not_be_read():
    cache = KVCache(tiny_layout(8, None, block_size=4), (40,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=101, history=100)
    assert held(sequence, 0) == {23, 24, 25}
    assert held(sequence, 1) == set(range(26))
    cache.close()


def test_eviction_gives_room_to_the_same_resize():
    cache = KVCache(tiny_layout(4, block_size=4), (5,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=12, history=0)
    assert not cache.resize(sequence, capacity=16, history=0)
    assert cache.resize(sequence, capacity=16, history=12)
    cache.check_invariants()
    cache.close()


def test_a_resize_that_one_pool_refuses_changes_no_pool():
    layout = tiny_layout(8, 8, None, block_size=4)
    cache = KVCache(layout, (30, 6))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=16, history=0)
    before = snapshot(cache, sequence)
    assert not cache.resize(sequence, capacity=20, history=16)
    after = snapshot(cache, sequence)
    assert after == before
    cache.close()


def test_groups_that_share_a_pool_are_counted_together():
    cache = KVCache(tiny_layout(100, None, block_size=4), (2 + 5,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=8, history=0)
    assert not cache.resize(sequence, capacity=12, history=0)
    cache.close()


def test_capacity_shrinks_to_the_history():
    cache = KVCache(tiny_layout(8, None, block_size=4), (40,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=40, history=10)
    assert cache.resize(sequence, capacity=10, history=10)
    assert held(sequence, 1) == {0, 1, 2}
    cache.check_invariants()
    cache.close()


def test_what_a_window_lets_go_is_counted_and_said(caplog):
    cache = KVCache(tiny_layout(6, None, block_size=4), (40,))
    sequence = cache.open("a")
    cache.resize(sequence, capacity=18, history=0)
    assert cache.num_outdated == (0, 0)
    with caplog.at_level("DEBUG"):
        cache.resize(sequence, capacity=19, history=18)  # the next query sees positions 13 to 18
    assert cache.num_outdated == (3, 0)
    assert caplog.messages == ["a: the window of window-6 lets go of 3 blocks at 18"]
    cache.resize(sequence, capacity=18, history=18)
    cache.close_sequence(sequence)
    assert cache.num_outdated == (3, 0), "a shorter capacity and an end are no window's doing"
    cache.close()


def test_a_model_without_kv_has_sequences_that_hold_nothing():
    cache = KVCache(tiny_layout(), ())
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=100, history=50)
    assert sequence.tables == ()
    cache.close_sequence(sequence)
    cache.check_invariants()


def test_layers_see_their_own_part_of_a_slot():
    cache = KVCache(tiny_layout(8, None, 8, block_size=4), (6, 6))
    cache.layer_view(2)[3] = 1.0
    assert cache.layer_view(2).shape == (6, 2, 1, 4, 2)
    assert cache.layer_view(0)[3].sum() == 0
    assert cache.group_view(0)[3, 1].sum() == 2 * 4 * 2
    cache.close()


def test_a_pool_that_does_not_fit_closes_those_before_it(monkeypatch):
    from disagg.cache import pool as pool_module
    from disagg.cache import slot_memory
    from disagg.cache.errors import PoolMemoryShort

    frees = iter([1 << 40, 0, 0])
    monkeypatch.setattr(slot_memory, "available_nbytes", lambda: next(frees))
    opened = []
    monkeypatch.setattr(pool_module.SlotPool, "close", lambda self: opened.append(self))
    with pytest.raises(PoolMemoryShort):
        KVCache(tiny_layout(8, 8, None), (6, 6))
    assert len(opened) == 1


@pytest.mark.parametrize("fault", ["double", "leak", "stale"])
def test_check_invariants_notices(fault):
    cache = KVCache(tiny_layout(8, None, block_size=4), (40,))
    sequence = cache.open("a")
    cache.resize(sequence, capacity=40, history=30)
    cache.check_invariants()
    if fault == "double":
        sequence.tables[1][0] = sequence.tables[1][1]
    elif fault == "leak":
        cache.pools[0].allocate(1)
    else:
        sequence.tables[0][0] = cache.pools[0].allocate(1)[0]
    with pytest.raises(AssertionError):
        cache.check_invariants()
    cache.close()


class CacheMachine(RuleBasedStateMachine):
    """Any order of open, resize and close, over windows with and without sinks, full attention, and two pools."""

    def __init__(self):
        super().__init__()
        self.layout = tiny_layout(6, 6, None, 1, 11, block_size=4, num_sink_tokens=5)
        self.cache = KVCache(self.layout, (2 + 9, 2 + 22))
        self.sequences = []
        self.num_opened = 0
        self.num_outdated = [0] * self.layout.num_groups

    @rule()
    def open(self):
        self.num_opened += 1
        self.sequences.append(self.cache.open(self.num_opened))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), step=st.integers(0, 14), room=st.integers(0, 14))
    def resize(self, data, step, room):
        sequence = data.draw(st.sampled_from(self.sequences))
        history = min(sequence.history + step, sequence.history + 30)
        before, capacity = snapshot(self.cache, sequence), history + room
        gone = self.outdated(sequence, max(capacity, sequence.capacity), history)
        done = self.cache.resize(sequence, capacity=capacity, history=history)
        assert done == self.should_fit(sequence, before, capacity, history)
        if not done:
            assert snapshot(self.cache, sequence) == before
        self.num_outdated = [n + len(blocks) * done for n, blocks in zip(self.num_outdated, gone, strict=True)]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), wipe=st.booleans())
    def close(self, data, wipe):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.cache.close_sequence(sequence, wipe=wipe)

    def should_fit(self, sequence, before, capacity, history):
        """Whether the oracle's demand for every open sequence, this one changed, fits every pool."""
        demand = [0] * self.layout.num_pools
        for other in self.sequences:
            cursors = (capacity, history) if other is sequence else (other.capacity, other.history)
            for group, pool in zip(self.layout.groups, self.layout.pool_of_group, strict=True):
                demand[pool] += len(resident_blocks(*cursors, group, self.layout.block_size))
        return all(d <= p.num_slots - 2 for d, p in zip(demand, self.cache.pools, strict=True))

    def outdated(self, sequence, capacity, history):
        """Per group, the blocks it holds that no query from `history` on attends to."""
        size = self.layout.block_size
        cursors = (sequence.capacity, sequence.history), (capacity, history)
        before, after = ([resident_blocks(*at, group, size) for group in self.layout.groups] for at in cursors)
        return [old - new for old, new in zip(before, after, strict=True)]

    @invariant()
    def windows_let_go_of_what_a_token_walk_finds(self):
        assert self.cache.num_outdated == tuple(self.num_outdated)

    @invariant()
    def tables_hold_what_a_token_walk_finds(self):
        self.cache.check_invariants()
        for sequence in self.sequences:
            for number, group in enumerate(self.layout.groups):
                expected = resident_blocks(sequence.capacity, sequence.history, group, self.layout.block_size)
                assert held(sequence, number) == expected

    def teardown(self):
        for sequence in self.sequences:
            self.cache.close_sequence(sequence)
        self.cache.check_invariants()
        assert all(usage.num_used == 0 for usage in self.cache.usage())
        self.cache.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
