"""Both ends of planes on which the receiver sees the sender's pools in its own address space: inproc and shm."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.transceiver.layout.runs import adjacent, ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.copying import check_generations, check_slots, copy_slots
from disagg.transceiver.memory.regions import LandingJob, PoolRegion
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.copying_plane import Copy, CopyingLandingPlane
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, PlaneRefused


class ReadSourcePlane(SourcePlane):
    """Sends nothing: receivers read its pools."""

    sends_bytes = False

    async def send(
        self,
        peer: str,
        transfer_id: str,
        epoch: int,
        number: int,
        units: Sequence[SourceUnit],
        regions: Sequence[PoolRegion] | None = None,
    ) -> None:
        raise LocalProtocolError(f"{self.name} sends no bytes: the receiver reads them")


class ReadingLandingPlane(CopyingLandingPlane):
    """Copies slots from `_sources` into `_pools`, one memcpy per run that is adjacent on both sides."""

    reads_sources = True

    def __init__(self) -> None:
        self._sources: tuple[PoolRegion, ...] = ()
        self._pools: tuple[PoolRegion, ...] = ()
        self._is_lost = True

    def _open(self, sources: Sequence[PoolRegion], pools: Sequence[PoolRegion]) -> None:
        """Begin to serve. Raises `PlaneRefused` when slots differ in size."""
        theirs = [region.slots.shape[1] for region in sources]
        ours = [region.slots.shape[1] for region in pools]
        if theirs != ours:
            raise PlaneRefused(f"slot bytes per pool differ: ours {ours}, theirs {theirs}")
        self._sources, self._pools, self._is_lost = tuple(sources), tuple(pools), False

    @property
    def sources(self) -> tuple[PoolRegion, ...]:
        """The sender's pools as this process sees them, read-only; none before `connect` and after `close`."""
        return self._sources

    def _lose(self) -> None:
        """The source is gone: nothing more can be fetched. Its memory stays readable for jobs that run."""
        if not self._is_lost:
            self._is_lost = True
            if self.on_lost is not None:
                self.on_lost()

    def is_here(self, job: LandingJob) -> bool:
        """The bytes lie in the source's slots."""
        if self._is_lost:
            raise PeerLost(f"the source {job.source} of this {self.name} plane is gone")
        return True

    async def fetch(self, job: LandingJob) -> None:
        """Nothing to wait for. Raises `PeerLost`."""
        self.is_here(job)

    def land(self, job: LandingJob, copy: Copy | None = None) -> int:
        """Copy between two checks of generations. Raises `SourceChanged`, or `RemoteProtocolError` for bad slots."""
        units = job.destinations
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        source_slots = ints([u.source_slot for u in units])
        planned = ints([u.source_generation for u in units])
        check_slots(self._sources, pools, source_slots)
        check_generations(self._sources, pools, source_slots, planned)
        (copy or copy_slots)(self._pools, self._sources, pools, slots, source_slots)
        check_generations(self._sources, pools, source_slots, planned)
        self._count_operations(sum(1 for _ in adjacent(pools, source_slots, slots)))
        return sum(self._pools[pool].slots.shape[1] for pool in pools.tolist())

    def discard(self, transfer_id: str, epoch: int) -> None:
        """Nothing arrives here before it is landed."""
