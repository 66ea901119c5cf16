"""Digests of blocks that were hashed before: a reused block is the same bytes for as long as its slot's generation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from disagg.transceiver.layout.units import HashedUnit, SourceUnit

Hash = Callable[[Sequence[SourceUnit]], Awaitable[tuple[HashedUnit, ...]]]
"""`disagg.transceiver.peers.landing_threads.LandingThreads.digest_units`."""


class KeptDigests:
    """By pool and slot, each good for one generation. Only final units are given to it; only the event loop uses it.

    A slot has one digest, or for peers of another geometry one for each of the units it is cut into.
    """

    def __init__(self, num_slots: Sequence[int], per_slot: int = 1) -> None:
        """`num_slots[p]` slots in pool p, each of `per_slot` units."""
        self._per_slot = per_slot
        self._generations = [
            np.zeros(count, dtype=np.uint64) for count in num_slots
        ]  # 0 = nothing kept: never a unit's
        self._digests = [np.zeros((count, per_slot), dtype=np.uint64) for count in num_slots]

    async def digest_units(self, slots: Sequence[SourceUnit], hash_units: Hash) -> tuple[HashedUnit, ...]:
        """The units of `slots` with their digests, in order; those of slots that are unknown are hashed and kept.

        What was known is taken before the wait: a slot that is given away meanwhile has another block's digests then.
        Raises what `hash_units` raises.
        """
        known = [self._find(slot) for slot in slots]
        unknown = [slot for slot, units in zip(slots, known, strict=True) if units is None]
        hashed = self._by_slot(await hash_units(unknown)) if unknown else []
        for slot, units in zip(unknown, hashed, strict=True):
            self._keep(slot, units)
        fresh = iter(hashed)
        return tuple(unit for units in known for unit in (next(fresh) if units is None else units))

    def keep_landed(self, units: Sequence[HashedUnit]) -> None:
        """Whole slots, hashed where they landed and verified against what their sender had hashed."""
        assert self._per_slot == 1
        for unit in units:
            self._keep(unit, (unit,))

    async def recheck(self, slots: Sequence[SourceUnit], hash_units: Hash) -> tuple[bool | None, ...]:
        """Hash `slots` again, in order: True = as it was kept, False = changed; None = nothing was kept, and now is."""
        hashed = self._by_slot(await hash_units(slots))
        known = [self._find(slot) for slot in slots]  # after the wait: digests made meanwhile count too
        for slot, units, before in zip(slots, hashed, known, strict=True):
            if before is None:
                self._keep(slot, units)
        return tuple(None if before is None else before == units for units, before in zip(hashed, known, strict=True))

    def _by_slot(self, units: Sequence[HashedUnit]) -> list[tuple[HashedUnit, ...]]:
        return [tuple(units[first : first + self._per_slot]) for first in range(0, len(units), self._per_slot)]

    def _keep(self, slot: SourceUnit, units: Sequence[HashedUnit]) -> None:
        self._generations[slot.pool][slot.slot] = slot.generation
        self._digests[slot.pool][slot.slot] = [unit.digest for unit in units]

    def _find(self, slot: SourceUnit) -> tuple[HashedUnit, ...] | None:
        if int(self._generations[slot.pool][slot.slot]) != slot.generation:
            return None
        first = slot.ordinal * self._per_slot
        return tuple(
            HashedUnit(slot.group, first + part, slot.pool, slot.slot, slot.generation, digest)
            for part, digest in enumerate(self._digests[slot.pool][slot.slot].tolist())
        )
