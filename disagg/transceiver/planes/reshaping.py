"""Landing from a peer of another geometry: any plane, with units for slots (protocol.md section 7).

Where the receiver reads the sender's memory, it copies parts of slots straight from there. Where the sender pushes,
what arrives is packed: the plane lands whole units in rows of a bounded staging area, and from there they are scattered
into their places. Either way the landing thread is the only one that writes a slot.

Units are hashed as they lie in their places; where storing them rounds, what was stored is hashed before that.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from disagg.transceiver.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.messages.values import Geometry, PlaneOffer
from disagg.transceiver.outbox import SLICE_NBYTES
from disagg.transceiver.planes.base import Bytes, Destination, LandingJob, LandingPlane, PoolRegion
from disagg.transceiver.planes.copying import check_generations, check_slots, ints
from disagg.transceiver.planes.probe import PROBE_ID
from disagg.transceiver.planes.reading import ReadingLandingPlane
from disagg.transceiver.units import SlotUnits, by_group, peer_unit

STAGED_SLICES: Final = 4
"""Slices per group that staging holds: one arriving, one being scattered, and two so that neither waits for the other.
Memory is touched only as it is used: 32 MiB per group and peer at the most, or four units where those are larger."""

_PROBED_ROWS: Final = 2  # the probe lands in a trash slot, which is number 1


@dataclass(frozen=True, slots=True)
class _Staged:
    job: LandingJob
    rows: tuple[tuple[int, int], ...]  # (group, row)


class ReshapingPlane(LandingPlane):
    """`inner` for a sender of geometry `theirs`; lands in `pools` of geometry `ours`, by the units of both."""

    def __init__(self, inner: LandingPlane, theirs: Geometry, ours: Geometry, pools: Sequence[PoolRegion]) -> None:
        unit = peer_unit(ours, theirs.block_size)
        self._inner, self._theirs, self._geometry = inner, theirs, ours
        self.cut = SlotUnits(ours, pools, unit, theirs, is_sender=False)
        self.name, self.reads_sources, self.is_private = inner.name, inner.reads_sources, inner.is_private
        self.probe_pools = tuple(_region(_PROBED_ROWS, nbytes) for nbytes in theirs.slot_nbytes)
        """What `connect` and the probe take for pools: as large as the sender's slots."""
        self._sources: SlotUnits | None = None
        self._staging = _Staging(self.cut.unit_nbytes)
        self._staged: dict[tuple[str, int, int], _Staged] = {}
        self._stored = _Stored()
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
        """Wait for room in staging, then for the bytes."""
        if self.reads_sources or job.transfer_id == PROBE_ID:
            await self._inner.fetch(job)
            return
        rows = await self._staging.take([unit.group for unit in job.destinations])
        first = len(self.probe_pools)
        staged = [
            Destination(unit.group, unit.ordinal, first + unit.group, row)
            for unit, (_, row) in zip(job.destinations, rows, strict=True)
        ]
        staged_job = replace(job, destinations=tuple(staged))
        try:
            await self._inner.fetch(staged_job)
        except BaseException:
            self._staging.give(rows)
            raise
        self._staged[_key(job)] = _Staged(staged_job, rows)

    def land(self, job: LandingJob) -> int:
        if job.transfer_id == PROBE_ID:
            return self._inner.land(job)
        self._stored.rows = []
        return self._read(job) if self._sources is not None else self._unpack(job)

    @property
    def wire_dtype(self) -> str:
        """The format of the bytes that `landed` gives."""
        return self.cut.wire_dtype

    def landed(self, job: LandingJob) -> Iterator[tuple[int, int, Bytes]]:
        """(start, stop, rows): the canonical bytes of units start..stop of the job this thread landed last.

        Read from where they now lie, or where the conversion rounded, those that were converted.
        """
        kept = iter(self._stored.rows)
        for start, stop in by_group(job.destinations):
            units = job.destinations[start:stop]
            if not self.cut.can_reread:
                yield start, stop, next(kept)
                continue
            rows = self.cut.reread(units[0].group, ints([u.ordinal for u in units]), ints([u.slot for u in units]))
            yield start, stop, rows

    def discard(self, transfer_id: str, epoch: int) -> None:
        self._inner.discard(transfer_id, epoch)
        for key in [key for key in self._staged if key[:2] == (transfer_id, epoch)]:
            self._staging.give(self._staged.pop(key).rows)

    async def close(self) -> None:
        await self._inner.close()
        self._sources = None
        self._staged.clear()

    def _lost(self) -> None:
        if self.on_lost is not None:
            self.on_lost()

    # --- on the landing thread --------------------------------------------------------------------------------

    def _read(self, job: LandingJob) -> int:
        """Rectangles straight out of the sender's slots, between two checks of their generations."""
        assert isinstance(self._inner, ReadingLandingPlane)
        assert self._sources is not None
        regions, units = self._inner.sources, job.destinations
        pools = ints([self._sources.pool_of_group[unit.group] for unit in units])
        slots, planned = ints([u.source_slot for u in units]), ints([u.source_generation for u in units])
        check_slots(regions, pools, slots)
        check_generations(regions, pools, slots, planned)
        ordinals = ints([unit.ordinal for unit in units])
        nbytes = 0
        for start, stop in by_group(units):
            rows = self._sources.gather(units[start].group, ordinals[start:stop], slots[start:stop])
            nbytes += self._store(units[start:stop], rows)
        check_generations(regions, pools, slots, planned)
        return nbytes

    def _unpack(self, job: LandingJob) -> int:
        staged = self._staged.pop(_key(job), None)
        if staged is None:
            raise LocalProtocolError("this slice was not fetched, or was discarded")
        try:
            nbytes = self._inner.land(staged.job)
            for start, stop in by_group(job.destinations):
                units, rows = job.destinations[start:stop], ints([row for _, row in staged.rows[start:stop]])
                self._store(units, self._staging.regions[units[0].group].slots[rows])
        finally:
            self._loop.call_soon_threadsafe(self._staging.give, staged.rows)
        return nbytes

    def _store(self, units: Sequence[Destination], rows: Bytes) -> int:
        """Scatter units of one group into their slots; their bytes."""
        if not self.cut.can_reread:
            self._stored.rows.append(rows)
        self.cut.scatter(units[0].group, ints([u.ordinal for u in units]), ints([u.slot for u in units]), rows)
        self.num_operations += 1
        return rows.nbytes


class _Stored(threading.local):
    """What a thread stored last, at most a slice: it is hashed on the same thread right after."""

    def __init__(self) -> None:
        self.rows: list[Bytes] = []


class _Staging:
    """Rows of units, per group, handed out in the order they were asked for. On the loop."""

    def __init__(self, unit_nbytes: Sequence[int]) -> None:
        # Of a group of which nothing moves, a row: planes know regions by number.
        counts = [STAGED_SLICES * max(1, SLICE_NBYTES // nbytes) if nbytes else 1 for nbytes in unit_nbytes]
        self.regions = tuple(_region(count, nbytes) for count, nbytes in zip(counts, unit_nbytes, strict=True))
        self._free = [list(range(count)) for count in counts]
        self._waiting: deque[tuple[list[int], asyncio.Future[tuple[tuple[int, int], ...]]]] = deque()

    async def take(self, groups: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(group, row) for each; waits behind whoever waits already. `RemoteProtocolError` for more than a slice."""
        if any(groups.count(group) > len(self.regions[group].slots) for group in set(groups)):
            raise RemoteProtocolError(f"a slice of {len(groups)} units does not fit in staging")
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


def _region(num_rows: int, nbytes: int) -> PoolRegion:
    return PoolRegion(np.empty((num_rows, nbytes), dtype=np.uint8), np.zeros(num_rows, dtype=np.uint64), -1, 0)


def _key(job: LandingJob) -> tuple[str, int, int]:
    return job.transfer_id, job.epoch, job.number
