"""Which blocks of a prefix hit must be hashed again before anything is computed from them.

A block is hashed when it is final; memory can change afterwards. So a hit looks at its blocks anew, each at most once
per interval: what is reused often is looked at often, and a hit soon after another costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np

from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.table import HOLE
from disagg.transceiver.layout.units import SourceUnit


class PrefixRecheck:
    """When each slot's bytes were last known to be right. The model thread owns it."""

    def __init__(self, cache: KVCache, interval_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`interval_s` None: nothing is ever due."""
        self._cache, self._interval_s, self._clock = cache, interval_s, clock
        self._generations = [np.zeros(pool.num_slots, dtype=np.uint64) for pool in cache.pools]  # 0 = never seen
        self._seen_at = [np.zeros(pool.num_slots) for pool in cache.pools]

    def note(self, units: Sequence[SourceUnit]) -> None:
        """These are hashed now, for the first time or again: not due for an interval."""
        if self._interval_s is None:
            return
        now = self._clock()
        for number, (generations, seen_at) in enumerate(zip(self._generations, self._seen_at, strict=True)):
            mine = [unit for unit in units if unit.pool == number]
            slots = np.array([unit.slot for unit in mine], dtype=np.int64)
            generations[slots] = np.array([unit.generation for unit in mine], dtype=np.uint64)
            seen_at[slots] = now

    def due(self, sequence: CachedSequence) -> tuple[SourceUnit, ...]:
        """The blocks that a new sequence holds by reuse and that were not looked at for an interval."""
        if self._interval_s is None or not sequence.history:
            return ()
        oldest = self._clock() - self._interval_s
        found: list[SourceUnit] = []
        for group, table in enumerate(sequence.tables):
            number = self._cache.layout.pool_of_group[group]
            ordinals = np.flatnonzero(table != HOLE)
            slots = table[ordinals]
            generations = self._cache.pools[number].generations[slots]
            is_due = (generations != self._generations[number][slots]) | (self._seen_at[number][slots] < oldest)
            columns = (slots[is_due].tolist(), generations[is_due].tolist())
            found += map(SourceUnit, repeat(group), ordinals[is_due].tolist(), repeat(number), *columns)
        return tuple(found)
