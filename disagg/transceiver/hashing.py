"""Units hashed where they lie, and copied there just before where the plane can: one pass while they are in the cache.

In one call for all units of a slice where the compiled helper is (`kernels/native.py`), else piece by piece from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from disagg.kernels import native
from disagg.kernels.digest import new_digest
from disagg.kernels.finite import is_finite
from disagg.transceiver.events import LandedUnit
from disagg.transceiver.planes.base import Bytes, Destination, PoolRegion
from disagg.transceiver.planes.copying import Ints, addresses, copy_rows

PIECE_NBYTES: Final = 256 << 10
"""What is copied before it is looked at: source and destination together fit a core's L2 (1 MiB and more), so the look
reads no memory again; below this, Python's cost per piece, 3 us, shows against the 15 us of the copy."""


class Hasher:
    """Digest and finiteness of every unit of one landing job. `dtypes[g]`: torch dtype name of group g's KV."""

    def __init__(self, units: Sequence[Destination], dtypes: Sequence[str]) -> None:
        self._units, self._dtypes = units, dtypes
        self._digests = np.zeros(len(units), dtype=np.uint64)
        self._finite = np.ones(len(units), dtype=np.bool_)

    def copy(
        self,
        to: Sequence[PoolRegion],
        source: Sequence[PoolRegion],
        pools: Ints,
        slots: Ints,
        source_slots: Ints,
    ) -> None:
        """Copy each unit from `source_slots` to `slots` of its pool, and hash it there."""
        self._take(to, pools, slots, (source, source_slots))

    def look(self, regions: Sequence[PoolRegion], pools: Ints, slots: Ints) -> None:
        """Hash units that lie there already."""
        self._take(regions, pools, slots, None)

    def landed(self) -> tuple[LandedUnit, ...]:
        return tuple(
            LandedUnit(unit.group, unit.ordinal, digest, finite)
            for unit, digest, finite in zip(self._units, self._digests.tolist(), self._finite.tolist(), strict=True)
        )

    def _take(
        self,
        to: Sequence[PoolRegion],
        pools: Ints,
        slots: Ints,
        source: tuple[Sequence[PoolRegion], Ints] | None,
    ) -> None:
        groups = np.array([unit.group for unit in self._units], dtype=np.int64)
        for group in np.unique(groups).tolist():  # a group lies in one pool and has one dtype
            (chosen,) = np.nonzero(groups == group)
            pool = int(pools[chosen[0]])
            froms = (source[0][pool], source[1][chosen]) if source is not None else None
            self._take_group(chosen, self._dtypes[group], (to[pool], slots[chosen]), froms)

    def _take_group(
        self, chosen: Ints, dtype: str, to: tuple[PoolRegion, Ints], source: tuple[PoolRegion, Ints] | None
    ) -> None:
        nbytes = to[0].slots.shape[1]
        if native.can_land(nbytes):
            froms = addresses(*source) if source is not None else None
            self._digests[chosen], self._finite[chosen] = native.land(addresses(*to), froms, nbytes, dtype)
            return
        rows = [to[0].slots[slot] for slot in to[1].tolist()]
        source_rows = [source[0].slots[slot] for slot in source[1].tolist()] if source is not None else rows
        for index, row, source_row in zip(chosen.tolist(), rows, source_rows, strict=True):
            self._digests[index], self._finite[index] = _in_pieces(row, source_row, dtype)


def _in_pieces(row: Bytes, source: Bytes, dtype: str) -> tuple[int, bool]:
    value, finite = new_digest(), True
    for at in range(0, len(row), PIECE_NBYTES):
        piece = row[at : at + PIECE_NBYTES]
        if source is not row:
            copy_rows(piece, source[at : at + PIECE_NBYTES])
        value.update(piece.data)
        finite = finite and is_finite(piece, dtype)
    return value.intdigest(), finite
