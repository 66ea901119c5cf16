"""Cached blocks for other workers that are about to compute the same tokens.

What is lent is looked up by its tokens and held by nothing: of the cached blocks it is evicted last, and when it is,
its reader is told. So a loan takes no room from this worker's own sequences, and nothing is left over when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disagg.cache.cache import KVCache
from disagg.engine.commands import (
    AttemptKey,
    EngineEvent,
    LendPrefix,
    PrefixEvictedEvent,
    PrefixLentEvent,
    SuspectEvent,
)
from disagg.transceiver.layout.boundary import common_boundary, missing_at, ordinals_of
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.wire.messages.values import UnitName


class Lending:
    """The loans of one cache, by the transfer that reads them. The model thread owns it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._units: dict[AttemptKey, tuple[SourceUnit, ...]] = {}

    def lend(self, command: LendPrefix) -> list[EngineEvent]:
        """What is here of the tokens, as far as both workers together can go on from it."""
        if command.key in self._units:
            return []  # delivered twice
        boundary, units = self._find(command)
        self._units[command.key] = units
        if self._cache.prefixes is not None:
            self._cache.prefixes.lend(command.key, self._by_group(units))
        for group, slots in enumerate(self._by_group(units)):
            self._cache.publish(group, slots)
        return [PrefixLentEvent(command.key, boundary, units)]

    def end(self, key: AttemptKey) -> None:
        """Safe to repeat, and for keys without a loan."""
        if self._units.pop(key, None) is not None and self._cache.prefixes is not None:
            self._cache.prefixes.loans.end(key)

    def broken(self) -> list[EngineEvent]:
        """News of loans of which something is gone. They are over."""
        if not self._units or self._cache.prefixes is None:
            return []
        keys = [key for key in self._cache.prefixes.loans.take_broken() if isinstance(key, AttemptKey)]
        return [PrefixEvictedEvent(key) for key in keys if self._units.pop(key, None) is not None]

    def unregister(self, key: AttemptKey, names: Sequence[UnitName]) -> list[EngineEvent]:
        """The reader's digests disagree for these blocks: they, and what extends them, are not reused here."""
        named = {(name.group, name.ordinal) for name in names}
        units = tuple(unit for unit in self._units.get(key, ()) if (unit.group, unit.ordinal) in named)
        for unit in units:
            self._cache.unregister_slot(unit.group, unit.slot, unit.generation)
        self.end(key)
        return [SuspectEvent(key, units)]

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._units

    def _find(self, command: LendPrefix) -> tuple[int, tuple[SourceUnit, ...]]:
        layout, prefixes = self._cache.layout, self._cache.prefixes
        size, other = layout.block_size, command.held_block_size
        if prefixes is None:
            return 0, ()
        match = prefixes.look_up(command.tokens, command.salt)
        held = ordinals_of(command.held, layout.num_groups)
        boundary = common_boundary(layout.groups, len(command.tokens), match.resident, size, held, other)
        unit = min(size, other)
        units: list[SourceUnit] = []
        for entry in missing_at(layout.groups, boundary, unit, held, other):
            ordinals = np.unique(np.array(entry.ordinals, dtype=np.int64) * unit // size)
            slots, pool = match.slots[entry.group][ordinals], layout.pool_of_group[entry.group]
            generations = self._cache.pools[pool].generations[slots].tolist()
            columns = zip(ordinals.tolist(), slots.tolist(), generations, strict=True)
            units += [SourceUnit(entry.group, ordinal, pool, slot, gen) for ordinal, slot, gen in columns]
        return boundary, tuple(units)

    def _by_group(self, units: Sequence[SourceUnit]) -> list[list[int]]:
        """The deepest first, so that of what is lent these are evicted first."""
        slots: list[list[int]] = [[] for _ in self._cache.layout.groups]
        for unit in reversed(units):
            slots[unit.group].append(unit.slot)
        return slots
