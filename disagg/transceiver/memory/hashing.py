"""Units hashed where they lie, and copied there just before where the plane can: one pass while they are in the cache.

In one call for all units of a slice where the compiled helper is (`kernels/native.py`), else piece by piece from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from disagg.kernels import native
from disagg.kernels.digest import new_digest
from disagg.kernels.finite import is_finite
from disagg.transceiver.layout.runs import Ints, ints
from disagg.transceiver.memory.copying import addresses, copy_rows, copy_slots
from disagg.transceiver.memory.regions import Bytes, LandingJob, PoolRegion
from disagg.transceiver.protocol.events import LandedUnit

PIECE_NBYTES: Final = 256 << 10
"""What is copied before it is looked at: source and destination together fit a core's L2 (1 MiB and more), so the look
reads no memory again; below this, Python's cost per piece, 3 us, shows against the 15 us of the copy."""

AfterCopy = Callable[[LandingJob, Sequence[PoolRegion]], None]


class Hasher:
    """Digest and finiteness of every unit of one landing job, which its plane shows it by `copy`, `look` or `take`."""

    def __init__(
        self, job: LandingJob, pools: Sequence[PoolRegion], dtypes: Sequence[str], after_copy: AfterCopy | None = None
    ) -> None:
        """The job lands in `pools`; `dtypes[g]`: torch dtype name of group g's KV.

        `after_copy` runs between the job's copies and its hash, which are two passes then.
        """
        self._job, self._pools, self._dtypes, self._after_copy = job, pools, dtypes, after_copy
        self._digests = np.zeros(len(job.destinations), dtype=np.uint64)
        self._finite = np.ones(len(job.destinations), dtype=np.bool_)
        self._is_hashed = False

    def copy(
        self,
        to: Sequence[PoolRegion],
        source: Sequence[PoolRegion],
        pools: Ints,
        slots: Ints,
        source_slots: Ints,
    ) -> None:
        """Copy each unit from `source_slots` to `slots` of its pool, and hash it there."""
        if self._after_copy is not None:
            copy_slots(to, source, pools, slots, source_slots)
            return
        self._hash(to, pools, slots, (source, source_slots))
        self._is_hashed = True

    def look(self) -> None:
        """Hash the units in their slots, unless `copy` has."""
        if self._is_hashed:
            return
        self.copied()
        units = self._job.destinations
        self._hash(self._pools, ints([unit.pool for unit in units]), ints([unit.slot for unit in units]), None)

    def take(self, start: int, rows: Bytes, dtype: str) -> None:
        """Hash units from number `start` on by their bytes, contiguous `[n, nbytes]` of `dtype`. After `copied`."""
        region = PoolRegion(rows, np.zeros(0, dtype=np.uint64), -1, 0)
        self._hash_group(np.arange(start, start + len(rows)), dtype, (region, np.arange(len(rows))), None)

    def copied(self) -> None:
        """All of the job lies in its slots."""
        if self._after_copy is not None:
            self._after_copy(self._job, self._pools)

    def landed(self) -> tuple[LandedUnit, ...]:
        units = zip(self._job.destinations, self._digests.tolist(), self._finite.tolist(), strict=True)
        return tuple(LandedUnit(unit.group, unit.ordinal, digest, finite) for unit, digest, finite in units)

    def _hash(
        self,
        to: Sequence[PoolRegion],
        pools: Ints,
        slots: Ints,
        source: tuple[Sequence[PoolRegion], Ints] | None,
    ) -> None:
        groups = np.array([unit.group for unit in self._job.destinations], dtype=np.int64)
        for group in np.unique(groups).tolist():  # a group lies in one pool and has one dtype
            (chosen,) = np.nonzero(groups == group)
            pool = int(pools[chosen[0]])
            froms = (source[0][pool], source[1][chosen]) if source is not None else None
            self._hash_group(chosen, self._dtypes[group], (to[pool], slots[chosen]), froms)

    def _hash_group(
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


class NoHasher(Hasher):
    """Copies alone, for a benchmark: every digest is 0."""

    def _hash_group(
        self, chosen: Ints, dtype: str, to: tuple[PoolRegion, Ints], source: tuple[PoolRegion, Ints] | None
    ) -> None:
        if source is not None:
            (region, slots), (from_region, from_slots) = to, source
            copy_slots([region], [from_region], np.zeros(len(slots), dtype=np.int64), slots, from_slots)


def _in_pieces(row: Bytes, source: Bytes, dtype: str) -> tuple[int, bool]:
    value, finite = new_digest(), True
    for at in range(0, len(row), PIECE_NBYTES):
        piece = row[at : at + PIECE_NBYTES]
        if source is not row:
            copy_rows(piece, source[at : at + PIECE_NBYTES])
        value.update(piece.data)
        finite = finite and is_finite(piece, dtype)
    return value.intdigest(), finite
