"""Landing from a peer of another geometry: any plane, with units for slots (protocol.md section 7).

Where the receiver reads the sender's memory, it copies parts of slots straight from there. Where the sender pushes,
what arrives is packed: the plane lands whole units in rows of a bounded staging area, and from there they are scattered
into their places. Either way the landing thread is the only one that writes a slot.

Units are hashed as they lie in their places; where storing them rounds, what was stored is hashed before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from disagg.transceiver.layout.runs import ints
from disagg.transceiver.layout.slice_size import SLICE_NBYTES, units_per_slice
from disagg.transceiver.layout.units import peer_unit
from disagg.transceiver.memory.copying import check_generations, check_slots
from disagg.transceiver.memory.regions import Bytes, Destination, LandingJob, PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits, by_group
from disagg.transceiver.planes.base import LandingPlane, UnitHasher
from disagg.transceiver.planes.probe import PROBE_ID
from disagg.transceiver.planes.reading import ReadingLandingPlane
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages.values import Geometry, PlaneOffer

STAGED_SLICES: Final = 4
"""Slices per group that staging holds: one arriving, one being scattered, and two so that neither waits for the other.
Memory is touched only as it is used: 32 MiB per group and peer at the most, or four units where those are larger."""

_PROBED_ROWS: Final = 2  # the probe lands in a trash slot, which is number 1


RowsOf = Callable[[int, int], Bytes]
"""The canonical bytes, contiguous and of their own, of units start..stop of a job, which are of one group."""


@dataclass(frozen=True, slots=True)
class _Staged:
    job: LandingJob
    rows: tuple[tuple[int, int], ...]  # (group, row)


@dataclass(slots=True)
class _Stored:
    """What one job stored. `rows`: per group, where storing rounds, what was stored."""

    nbytes: int = 0
    num_saturated: int = 0
    rows: list[Bytes] = field(default_factory=list)


class ReshapingPlane(LandingPlane):
    """`inner` for a sender of geometry `theirs`; lands in `pools` of geometry `ours`, by the units of both."""

    def __init__(self, inner: LandingPlane, theirs: Geometry, ours: Geometry, pools: Sequence[PoolRegion]) -> None:
        unit = peer_unit(ours, theirs.block_size)
        self._inner, self._theirs, self._geometry = inner, theirs, ours
        self.cut = SlotUnits(ours, pools, unit, theirs, is_sender=False)
        self.name, self.reads_sources, self.is_private = inner.name, inner.reads_sources, inner.is_private
        self.probe_pools = probe_pools(theirs)
        """What `connect` and the probe take for pools: as large as the sender's slots."""
        self._sources: SlotUnits | None = None
        self._staging = _Staging(self.cut.unit_nbytes)
        self._staging_lock = threading.Lock()  # landing threads take out of `_staged` what the loop put in
        self._staged: dict[tuple[str, int, int], _Staged] = {}
        inner.on_lost = self._lost

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        """`pools` are `probe_pools`: only the probe lands there by itself."""
        self._loop = asyncio.get_running_loop()
        if isinstance(self._inner, ReadingLandingPlane):
            await self._inner.connect(me, offer, pools)
            self._sources = SlotUnits(self._theirs, self._inner.sources, self.cut.unit, self._geometry)
        else:
            await self._inner.connect(me, offer, [*pools, *self._staging.regions])
        self.lane = self._inner.lane

    async def ask_probe(self) -> None:
        await self._inner.ask_probe()

    def is_here(self, job: LandingJob) -> bool:
        return self.reads_sources and self._inner.is_here(job)

    async def fetch(self, job: LandingJob) -> None:
        """Wait until the slice arrives, then for room in staging, then for the bytes.

        In this order: rows held by slices whose turn has not come would be missed by the one that is before them.
        """
        if self.reads_sources or job.transfer_id == PROBE_ID:
            await self._inner.fetch(job)
            return
        groups = [unit.group for unit in job.destinations]
        self._staging.check(groups)
        await self._inner.arrive(self._staged_job(job, [-1] * len(groups)))
        rows = await self._staging.take(groups)
        staged_job = self._staged_job(job, [row for _, row in rows])
        try:
            await self._inner.fetch(staged_job)
        except BaseException:
            self._staging.give(rows)
            raise
        with self._staging_lock:
            self._staged[_key(job)] = _Staged(staged_job, rows)

    def _staged_job(self, job: LandingJob, rows: Sequence[int]) -> LandingJob:
        """`job` as the inner plane lands it: each unit whole, in a row of its group's staging."""
        first = len(self.probe_pools)
        staged = [
            Destination(unit.group, unit.ordinal, first + unit.group, row)
            for unit, row in zip(job.destinations, rows, strict=True)
        ]
        return replace(job, destinations=tuple(staged))

    def land(self, job: LandingJob) -> int:
        return self._inner.land(job) if job.transfer_id == PROBE_ID else self._store_all(job).nbytes

    def land_and_hash(self, job: LandingJob, hasher: UnitHasher) -> int:
        """Units are hashed by the canonical bytes that can be read from where they now lie, or where the conversion
        rounded, by those that were converted."""
        stored = self._store_all(job)
        hasher.copied()
        for start, stop in self._parts(job):
            rows = self._reread(job.destinations[start:stop]) if self.cut.can_reread else stored.rows.pop(0)
            hasher.take(start, rows, self.cut.wire_dtype)
        return stored.num_saturated

    def num_copies(self, job: LandingJob) -> int:
        """One scatter per part."""
        return sum(1 for _ in self._parts(job))

    def _parts(self, job: LandingJob) -> Iterator[tuple[int, int]]:
        """Half-open ranges of units of one group, 8 MiB at most: what is gathered is scattered out of the cache."""
        for start, stop in by_group(job.destinations):
            count = units_per_slice((self.cut.unit_nbytes[job.destinations[start].group],))
            for first in range(start, stop, count):
                yield first, min(first + count, stop)

    def discard(self, transfer_id: str, epoch: int) -> None:
        self._inner.discard(transfer_id, epoch)
        with self._staging_lock:
            keys = [key for key in self._staged if key[:2] == (transfer_id, epoch)]
            dropped = [self._staged.pop(key) for key in keys]
        for staged in dropped:
            self._staging.give(staged.rows)

    async def close(self) -> None:
        await self._inner.close()
        self._sources = None
        with self._staging_lock:
            self._staged.clear()

    def _lost(self) -> None:
        if self.on_lost is not None:
            self.on_lost()

    # --- on the landing thread --------------------------------------------------------------------------------

    def _store_all(self, job: LandingJob) -> _Stored:
        stored = _Stored()
        with self._arrived(job) if self._sources is None else self._readable(job) as rows_of:
            for start, stop in self._parts(job):
                units, rows = job.destinations[start:stop], rows_of(start, stop)
                places = units[0].group, ints([u.ordinal for u in units]), ints([u.slot for u in units])
                stored.num_saturated += self.cut.scatter(*places, rows)
                stored.nbytes += rows.nbytes
                if not self.cut.can_reread:
                    stored.rows.append(rows)
        self._count_operations(self.num_copies(job))
        return stored

    @contextlib.contextmanager
    def _readable(self, job: LandingJob) -> Iterator[RowsOf]:
        """Rectangles straight out of the sender's slots, between two checks of their generations."""
        assert isinstance(self._inner, ReadingLandingPlane)
        assert self._sources is not None
        sources, regions, units = self._sources, self._inner.sources, job.destinations
        pools = ints([sources.pool_of_group[unit.group] for unit in units])
        slots, planned = ints([u.source_slot for u in units]), ints([u.source_generation for u in units])
        ordinals = ints([unit.ordinal for unit in units])
        check_slots(regions, pools, slots)
        check_generations(regions, pools, slots, planned)
        yield lambda start, stop: sources.gather(units[start].group, ordinals[start:stop], slots[start:stop])
        check_generations(regions, pools, slots, planned)

    @contextlib.contextmanager
    def _arrived(self, job: LandingJob) -> Iterator[RowsOf]:
        """What the inner plane lands in staging, whose rows are free afterwards, whatever the outcome."""
        with self._staging_lock:
            staged = self._staged.pop(_key(job), None)
        if staged is None:
            raise LocalProtocolError("this slice was not fetched, or was discarded")
        rows, regions = ints([row for _, row in staged.rows]), self._staging.regions
        try:
            self._inner.land(staged.job)
            yield lambda start, stop: regions[job.destinations[start].group].slots[rows[start:stop]]
        finally:
            self._loop.call_soon_threadsafe(self._staging.give, staged.rows)

    def _reread(self, units: Sequence[Destination]) -> Bytes:
        return self.cut.reread(units[0].group, ints([u.ordinal for u in units]), ints([u.slot for u in units]))


class _Staging:
    """Rows of units, per group, handed out in the order they were asked for. On the loop."""

    def __init__(self, unit_nbytes: Sequence[int]) -> None:
        # Of a group of which nothing moves, a row: planes know regions by number.
        counts = [STAGED_SLICES * max(1, SLICE_NBYTES // nbytes) if nbytes else 1 for nbytes in unit_nbytes]
        self.regions = tuple(_region(count, nbytes) for count, nbytes in zip(counts, unit_nbytes, strict=True))
        self._free = [list(range(count)) for count in counts]
        self._waiting: deque[tuple[list[int], asyncio.Future[tuple[tuple[int, int], ...]]]] = deque()

    def check(self, groups: Sequence[int]) -> None:
        """Raises `RemoteProtocolError` for more than a slice: `take` would wait in vain."""
        if any(groups.count(group) > len(self.regions[group].slots) for group in set(groups)):
            raise RemoteProtocolError(f"a slice of {len(groups)} units does not fit in staging")

    async def take(self, groups: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(group, row) for each; waits behind those that wait already."""
        rows: asyncio.Future[tuple[tuple[int, int], ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(groups), rows))
        self._serve()
        try:
            return await rows
        except asyncio.CancelledError:
            if rows.done() and not rows.cancelled():
                self.give(rows.result())
            raise

    def give(self, rows: Sequence[tuple[int, int]]) -> None:
        for group, row in rows:
            heapq.heappush(self._free[group], row)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            groups, taker = self._waiting[0]
            if taker.cancelled():
                self._waiting.popleft()
                continue
            if any(groups.count(group) > len(self._free[group]) for group in set(groups)):
                return
            self._waiting.popleft()
            # The lowest rows first: neighbours in a slice are neighbours in staging, and land in one copy.
            taker.set_result(tuple((group, heapq.heappop(self._free[group])) for group in groups))


def probe_pools(sender: Geometry) -> tuple[PoolRegion, ...]:
    """What the probe moves between where there are no pools to move it between."""
    return tuple(_region(_PROBED_ROWS, nbytes) for nbytes in sender.slot_nbytes)


def _region(num_rows: int, nbytes: int) -> PoolRegion:
    return PoolRegion(np.empty((num_rows, nbytes), dtype=np.uint8), np.zeros(num_rows, dtype=np.uint64), -1, 0)


def _key(job: LandingJob) -> tuple[str, int, int]:
    return job.transfer_id, job.epoch, job.number
