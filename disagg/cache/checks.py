"""What must be true of a cache after every change. Tests and `DISAGG_CHECK` ask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from disagg.cache.cached_sequence import CachedSequence
from disagg.cache.layout import CacheLayout
from disagg.cache.pool import NUM_RESERVED_SLOTS, SlotPool
from disagg.cache.scratch import Scratch
from disagg.cache.table import HOLE


def check_references(layout: CacheLayout, pools: Sequence[SlotPool], sequences: Sequence[CachedSequence]) -> None:
    """Every reference that a pool counts is one entry of one table, or one scratch slot."""
    refs = [np.zeros(pool.num_slots, dtype=np.int64) for pool in pools]
    for sequence in sequences:
        for table, number in zip(sequence.tables, layout.pool_of_group, strict=True):
            np.add.at(refs[number], table[table != HOLE], 1)
        for group, scratch in enumerate(sequence.scratch):
            if scratch is not None:
                np.add.at(refs[layout.pool_of_group[group]], list(scratch.slots), 1)
    for counted, owner in zip(refs, pools, strict=True):
        owner.check_invariants()
        every = np.arange(owner.num_slots)
        assert not counted[:NUM_RESERVED_SLOTS].any(), "a reserved slot is held"
        assert (counted == owner.num_refs(every)).all(), "a slot is held by more or fewer than it counts"


def leave_out(wanted: NDArray[np.bool_], scratch: Scratch | None) -> None:
    """Of the blocks that a sequence wants, those in scratch slots have no slot of their own."""
    if scratch is not None:
        assert wanted[scratch.first : scratch.first + scratch.num_blocks].all(), "a scratch block is stale already"
        wanted[scratch.first : scratch.first + scratch.num_blocks] = False
