"""Landing by reading: planes on which the receiver sees the sender's pools in its own address space (inproc, shm)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from disagg.transceiver.errors import PeerLost, PlaneRefused
from disagg.transceiver.planes.base import Bytes, LandingJob, LandingPlane, PoolRegion
from disagg.transceiver.planes.copying import adjacent, check_generations, check_slots, copy_rows, ints

PIECE_NBYTES: Final = 256 << 10
"""What is copied before it is looked at: source and destination together fit a core's L2 (1 MiB and more), so the look
reads no memory again; below this, Python's cost per piece, 3 us, shows against the 15 us of the copy."""

OnPiece = Callable[[int, Bytes], None]
"""Called with a unit's index in its job and its next bytes at the destination, in order, right after their copy."""


class ReadingLandingPlane(LandingPlane):
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

    async def fetch(self, job: LandingJob) -> None:
        """Nothing to wait for: the bytes lie in the source's slots. Raises `PeerLost`."""
        if self._is_lost:
            raise PeerLost(f"the source {job.source} of this {self.name} plane is gone")

    def land(self, job: LandingJob, on_piece: OnPiece | None = None) -> int:
        """Copy between two checks of generations. Raises `SourceChanged`, or `RemoteProtocolError` for bad slots."""
        units = job.destinations
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        source_slots = ints([u.source_slot for u in units])
        planned = ints([u.source_generation for u in units])
        check_slots(self._sources, pools, source_slots)
        check_generations(self._sources, pools, source_slots, planned)
        nbytes = 0
        for start, stop in adjacent(pools, source_slots, slots):
            source, to = self._sources[units[start].pool], self._pools[units[start].pool]
            first, target, count = units[start].source_slot, units[start].slot, stop - start
            rows, source_rows = to.slots[target : target + count], source.slots[first : first + count]
            if on_piece is None:
                copy_rows(rows, source_rows)
            else:
                _copy_in_pieces(rows, source_rows, start, on_piece)
            nbytes += count * source.slots.shape[1]
            self.num_operations += 1
        check_generations(self._sources, pools, source_slots, planned)
        return nbytes

    def discard(self, transfer_id: str, epoch: int) -> None:
        """Nothing arrives here before it is landed."""


def _copy_in_pieces(rows: Bytes, source_rows: Bytes, first: int, on_piece: OnPiece) -> None:
    for index, (row, source) in enumerate(zip(rows, source_rows, strict=True), first):
        for at in range(0, len(row), PIECE_NBYTES):
            piece = row[at : at + PIECE_NBYTES]
            copy_rows(piece, source[at : at + PIECE_NBYTES])
            on_piece(index, piece)
