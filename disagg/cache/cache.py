"""Who holds which block: per sequence and group a table (index = ordinal, value = slot or -1), over several pools.

A sequence has three cursors, committed <= history <= capacity, and one atomic `resize`. Stale blocks go as history
advances, in prefill chunks and in decode alike. `committed` counts tokens in shared, immutable blocks: 0 until prefix
reuse exists, and then the front of a table will name slots that several sequences refer to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.cache.layout import CacheLayout, LayerGroup
from disagg.cache.pool import NUM_RESERVED_SLOTS, SlotPool
from disagg.cache.window import stale_range

HOLE = -1
"""Table value of an ordinal that has no slot: stale, or never allocated."""

Table = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Slots of one pool; `num_slots` counts the two reserved ones, the others do not."""

    slot_nbytes: int
    num_slots: int
    num_used: int
    num_free: int
    peak_used: int


@dataclass(slots=True, eq=False)
class CachedSequence:
    """What one sequence holds. Changed only by its `KVCache`.

    `tables[g]`: int32 [ceil(capacity / block_size)], slot of each ordinal of group g, or -1.
    """

    key: Hashable
    tables: tuple[Table, ...]
    capacity: int = 0
    history: int = 0
    committed: int = 0

    @property
    def num_blocks(self) -> int:
        """Ordinals the capacity spans, holes included (0 for a model without KV)."""
        return len(self.tables[0]) if self.tables else 0


class KVCache:
    """Pools and the sequences that hold their slots. The model thread owns it; nobody else calls it."""

    def __init__(self, layout: CacheLayout, num_slots: Sequence[int], device: str = "cpu") -> None:
        """`num_slots[p]` slots in pool p, the reserved two included. Raises PoolMemoryShort."""
        assert len(num_slots) == layout.num_pools
        self.layout = layout
        self.pools: tuple[SlotPool, ...] = ()
        for nbytes, count in zip(layout.slot_nbytes, num_slots, strict=True):
            try:
                self.pools += (SlotPool(nbytes, count, device),)
            except Exception:
                self.close()  # a later pool that does not fit must not leave the earlier ones open
                raise
        self._sequences: dict[Hashable, CachedSequence] = {}
        self._group_views = [
            self.pools[pool].view(group, layout.block_size)
            for group, pool in zip(layout.groups, layout.pool_of_group, strict=True)
        ]

    def open(self, key: Hashable) -> CachedSequence:
        """A sequence that holds nothing yet."""
        assert key not in self._sequences, f"sequence {key} is open already"
        sequence = CachedSequence(key, tuple(np.empty(0, dtype=np.int32) for _ in self.layout.groups))
        self._sequences[key] = sequence
        return sequence

    def resize(self, sequence: CachedSequence, *, capacity: int, history: int) -> bool:
        """Declare `history` tokens done, make room for `capacity`. False, with nothing changed, when a pool is short.

        Afterwards the sequence holds exactly the ordinals of [0, ceil(capacity/T)) that are not stale at `history`,
        in every group; new slots are zeroed. `history` never goes back; `capacity` may shrink down to it.
        """
        assert self._sequences.get(sequence.key) is sequence, f"sequence {sequence.key} is closed"
        assert sequence.history <= history <= capacity
        shape = self._shape(capacity, history)
        if shape != self._shape(sequence.capacity, sequence.history):  # most decode steps stay inside one block
            wanted = [self._wanted(group, capacity, history) for group in self.layout.groups]
            if not self._fits(sequence, wanted):
                return False
            self._apply(sequence, wanted)
        sequence.capacity, sequence.history = capacity, history
        return True

    def close_sequence(self, sequence: CachedSequence, *, wipe: bool = False) -> None:
        """Free all it holds. `wipe` zeroes the slots at once, for a sequence whose KV may not be finite."""
        assert self._sequences.pop(sequence.key, None) is sequence, f"sequence {sequence.key} is not open"
        for table, pool in zip(sequence.tables, self.layout.pool_of_group, strict=True):
            self.pools[pool].free(table[table != HOLE].tolist(), wipe=wipe)
        sequence.tables = tuple(np.empty(0, dtype=np.int32) for _ in self.layout.groups)
        sequence.capacity = sequence.history = 0

    def layer_view(self, layer_index: int) -> torch.Tensor:
        """KV that a layer reads and writes: [num_slots, 2 (K, V), kv_heads, block_size, head_dim], strided, no copy."""
        group, position = self.layout.place(layer_index)
        return self._group_views[group][:, position]

    def group_view(self, group: int) -> torch.Tensor:
        """All layers of a group: [num_slots, layers, 2 (K, V), kv_heads, block_size, head_dim], no copy."""
        return self._group_views[group]

    def usage(self) -> tuple[PoolUsage, ...]:
        return tuple(PoolUsage(p.slot_nbytes, p.num_slots, p.num_used, p.num_free, p.peak_used) for p in self.pools)

    def close(self) -> None:
        """Close the pools' memfds; views that are still held stay valid."""
        for pool in self.pools:
            pool.close()

    def check_invariants(self) -> None:
        """Every slot is reserved, free, or held by exactly one table entry; tables hold exactly what cursors say."""
        held: list[list[int]] = [[] for _ in self.pools]
        for sequence in self._sequences.values():
            self._check_sequence(sequence)
            for table, pool in zip(sequence.tables, self.layout.pool_of_group, strict=True):
                held[pool].extend(table[table != HOLE].tolist())
        for slots, owner in zip(held, self.pools, strict=True):
            owner.check_invariants()
            assert len(set(slots)) == len(slots), "a slot is held twice"
            assert all(slot >= NUM_RESERVED_SLOTS and not owner.is_free(slot) for slot in slots), "a free slot is held"
            assert len(slots) == owner.num_used, "a slot is held by nobody"

    def _check_sequence(self, sequence: CachedSequence) -> None:
        assert 0 <= sequence.committed <= sequence.history <= sequence.capacity
        for group, table in zip(self.layout.groups, sequence.tables, strict=True):
            wanted = self._wanted(group, sequence.capacity, sequence.history)
            assert ((table != HOLE) == wanted).all(), f"{sequence.key}: group {group.name} holds other than it needs"

    def _shape(self, capacity: int, history: int) -> tuple[int, ...]:
        """All that decides which ordinals have a slot: how many there are, and where each group's stale range ends."""
        size = self.layout.block_size
        ends = (stale_range(history, g.window, g.num_sink_tokens, size).stop for g in self.layout.groups)
        return (self.layout.num_blocks(capacity), *ends)

    def _wanted(self, group: LayerGroup, capacity: int, history: int) -> NDArray[np.bool_]:
        """Which ordinals of [0, ceil(capacity/T)) must have a slot: those that are not stale at `history`."""
        wanted = np.ones(self.layout.num_blocks(capacity), dtype=np.bool_)
        stale = stale_range(history, group.window, group.num_sink_tokens, self.layout.block_size)
        wanted[stale.start : stale.stop] = False
        return wanted

    def _apply(self, sequence: CachedSequence, wanted: Sequence[NDArray[np.bool_]]) -> None:
        kept = [self._evict(sequence, group, keep) for group, keep in enumerate(wanted)]
        sequence.tables = tuple(self._grow(group, *pair) for group, pair in enumerate(zip(kept, wanted, strict=True)))

    def _fits(self, sequence: CachedSequence, wanted: Sequence[NDArray[np.bool_]]) -> bool:
        """Whether each pool can give the difference; groups that share a pool add up."""
        short = [-pool.num_free for pool in self.pools]
        for table, keep, pool in zip(sequence.tables, wanted, self.layout.pool_of_group, strict=True):
            short[pool] += int(keep.sum()) - int((table != HOLE).sum())
        return all(missing <= 0 for missing in short)

    def _evict(self, sequence: CachedSequence, group: int, wanted: NDArray[np.bool_]) -> Table:
        """The group's table cut or extended to the new length, its unwanted slots freed."""
        table = sequence.tables[group]
        keep = np.zeros(len(table), dtype=np.bool_)
        common = min(len(table), len(wanted))
        keep[:common] = wanted[:common]
        drop = (table != HOLE) & ~keep
        if drop.any():
            self.pools[self.layout.pool_of_group[group]].free(table[drop].tolist())
        resized = np.full(len(wanted), HOLE, dtype=np.int32)
        resized[:common] = np.where(keep[:common], table[:common], HOLE)
        return resized

    def _grow(self, group: int, table: Table, wanted: NDArray[np.bool_]) -> Table:
        missing = np.flatnonzero(wanted & (table == HOLE))
        if len(missing):
            table[missing] = self.pools[self.layout.pool_of_group[group]].allocate(len(missing))
        return table
