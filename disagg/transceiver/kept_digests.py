"""Digests of blocks that were hashed before: a reused block is the same bytes for as long as its slot's generation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from disagg.transceiver.events import Unit
from disagg.transceiver.planes.base import SourceUnit

Hash = Callable[[Sequence[SourceUnit]], Awaitable[tuple[Unit, ...]]]
"""`LandingThread.digest_units`."""


class KeptDigests:
    """By pool and slot, each good for one generation. Only final units are given to it; only the event loop uses it."""

    def __init__(self, num_slots: Sequence[int]) -> None:
        """`num_slots[p]` slots in pool p."""
        self._generations = [
            np.zeros(count, dtype=np.uint64) for count in num_slots
        ]  # 0 = nothing kept: never a unit's
        self._digests = [np.zeros(count, dtype=np.uint64) for count in num_slots]

    async def digest_units(self, units: Sequence[SourceUnit], hash_units: Hash) -> tuple[Unit, ...]:
        """`units` with their digests, in order; unknown ones are hashed and kept. Raises what `hash_units` raises."""
        unknown = [unit for unit in units if self._find(unit) is None]
        if unknown:
            for source, unit in zip(unknown, await hash_units(unknown), strict=True):
                self._keep(source, unit)
        return tuple(self._unit(unit) for unit in units)

    async def recheck(self, units: Sequence[SourceUnit], hash_units: Hash) -> tuple[bool | None, ...]:
        """Hash `units` again, in order: True = as it was kept, False = changed; None = nothing was kept, and now is."""
        known = [self._find(unit) for unit in units]
        hashed = await hash_units(units)
        for source, unit, before in zip(units, hashed, known, strict=True):
            if before is None:
                self._keep(source, unit)
        return tuple(
            None if before is None else before == unit.digest for unit, before in zip(hashed, known, strict=True)
        )

    def _keep(self, source: SourceUnit, unit: Unit) -> None:
        self._generations[source.pool][source.slot] = unit.generation
        self._digests[source.pool][source.slot] = unit.digest

    def _find(self, unit: SourceUnit) -> int | None:
        is_known = int(self._generations[unit.pool][unit.slot]) == unit.generation
        return int(self._digests[unit.pool][unit.slot]) if is_known else None

    def _unit(self, unit: SourceUnit) -> Unit:
        digest = self._find(unit)
        assert digest is not None, "it was known or has just been hashed"
        return Unit(unit.group, unit.ordinal, unit.slot, unit.generation, digest)
