"""One thread that copies and hashes: what would hold up the event loop, and what the model should not wait for.

It touches only slots it was handed: destinations of a reservation, or sources that will not change any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from disagg.kernels.digest import digest
from disagg.kernels.finite import finite_rows
from disagg.transceiver.errors import SourceChanged
from disagg.transceiver.events import LandedUnit, Unit
from disagg.transceiver.planes.base import LandingJob, LandingPlane, PoolRegion, SourceUnit
from disagg.transceiver.planes.copying import adjacent, ints

AfterCopy = Callable[[LandingJob, Sequence[PoolRegion]], None]


@dataclass(frozen=True, slots=True)
class Landed:
    """One slice where it lies now, in slice order, and how many copies that took."""

    units: tuple[LandedUnit, ...]
    num_operations: int


class LandingThread:
    """Runs landing and digest jobs in the order they were submitted. Use it from one event loop."""

    def __init__(
        self, pools: Sequence[PoolRegion], dtypes: Sequence[str], *, after_copy: AfterCopy | None = None
    ) -> None:
        """`dtypes[g]` is the torch dtype name of group g's KV.

        `after_copy` runs on the thread between a job's copy and its hash: tests flip a byte there.
        """
        self._pools = tuple(pools)
        self._dtypes = tuple(dtypes)
        self._after_copy = after_copy
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="landing")
        self._jobs: dict[tuple[str, int], set[Future[Any]]] = {}

    async def submit(self, job: LandingJob, plane: LandingPlane) -> Landed:
        """Land a slice that `plane.fetch` has seen, and hash every unit where it now lies.

        Raises what `plane.land` raises. Ends in `CancelledError` when `stop` removed it. Cancelling the caller removes
        a queued job; a running one goes on to its end, and until `stop` returned it may write its destinations.
        """
        future = self._executor.submit(self._land, job, plane)
        key = (job.transfer_id, job.epoch)
        self._jobs.setdefault(key, set()).add(future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.done():
                self._forget(key, future)

    async def digest_units(self, units: Sequence[SourceUnit]) -> tuple[Unit, ...]:
        """Hash final units of this process. Raises `SourceChanged` when a slot was given away meanwhile."""
        return await asyncio.wrap_future(self._executor.submit(self._digest, tuple(units)))

    async def stop(self, transfer_id: str, epoch: int) -> None:
        """Remove this epoch's queued jobs and join its running one: afterwards no job holds its destination slots."""
        key = (transfer_id, epoch)
        running = [future for future in self._jobs.get(key, ()) if not future.cancel()]
        # Whoever submitted hears of errors; here only the end matters.
        await asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True)
        self._jobs.pop(key, None)

    async def close(self) -> None:
        """Stop every job and end the thread. Safe to repeat."""
        for transfer_id, epoch in tuple(self._jobs):
            await self.stop(transfer_id, epoch)
        await asyncio.get_running_loop().run_in_executor(None, lambda: self._executor.shutdown(cancel_futures=True))

    def _forget(self, key: tuple[str, int], future: Future[Any]) -> None:
        futures = self._jobs.get(key, set())
        futures.discard(future)
        if not futures:
            self._jobs.pop(key, None)

    # --- on the thread ----------------------------------------------------------------------------------------

    def _land(self, job: LandingJob, plane: LandingPlane) -> Landed:
        num_operations = -plane.num_operations  # only this thread lands, so the difference is this job's alone
        plane.land(job)
        num_operations += plane.num_operations
        if self._after_copy is not None:
            self._after_copy(job, self._pools)
        landed: list[LandedUnit] = []
        units = job.destinations
        # The group stands for the pool here: units of one run share its dtype too.
        for start, stop in adjacent(ints([u.group for u in units]), ints([u.slot for u in units])):
            first = units[start]
            rows = self._pools[first.pool].slots[first.slot : first.slot + stop - start]
            finite = finite_rows(rows, self._dtypes[first.group]).tolist()
            landed += [
                LandedUnit(unit.group, unit.ordinal, digest(row), is_finite)
                for unit, row, is_finite in zip(units[start:stop], rows, finite, strict=True)
            ]
        return Landed(tuple(landed), num_operations)

    def _digest(self, units: Sequence[SourceUnit]) -> tuple[Unit, ...]:
        return tuple(self._digest_unit(unit) for unit in units)

    def _digest_unit(self, unit: SourceUnit) -> Unit:
        pool = self._pools[unit.pool]
        value = digest(pool.slots[unit.slot])
        if int(pool.generations[unit.slot]) != unit.generation:  # after: a change during the hash counts too
            raise SourceChanged(
                f"group {unit.group}, block {unit.ordinal}: its slot was given away before it was hashed"
            )
        return Unit(unit.group, unit.ordinal, unit.slot, unit.generation, value)
