"""What one sequence holds of a cache, and how much of a pool is held."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from disagg.cache.prefix_cache import Chain
from disagg.cache.scratch import Scratch
from disagg.cache.table import Table


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Slots of one pool; `num_slots` counts the two reserved ones, the others do not.

    `num_used`: referred to by sequences. `num_free`: can be allocated now, the `num_cached` registered ones included.
    `num_evicted`: cached slots that were emptied for another sequence, since start.
    """

    slot_nbytes: int
    num_slots: int
    num_used: int
    num_free: int
    peak_used: int
    num_cached: int = 0
    num_evicted: int = 0


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
    chain: Chain | None = None
    """Its way through the prefix tree; None where prefixes are not reused."""
    scratch: tuple[Scratch | None, ...] = ()
    """Per group, where the blocks lie that end with the step in progress; their table entries are -1."""
    partial: frozenset[tuple[int, int]] = frozenset()
    """(group, ordinal) of received blocks that lack some of their tokens: they are not registered."""
    room: int = 0
    """Tokens that fit its blocks: the capacity, rounded up."""
    is_open: bool = True
    trimmed: int = 0
    """The history of the last `resize`: the tables hold what is not stale there."""

    @property
    def is_committing(self) -> bool:
        """Whether blocks that become whole are still registered."""
        return self.chain is not None and not self.chain.is_stopped

    @property
    def num_blocks(self) -> int:
        """Ordinals that its tables span, holes included (0 for a model without KV)."""
        return len(self.tables[0]) if self.tables else 0
