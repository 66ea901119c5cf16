"""The threads that copy and hash: what would hold up the event loop, and what the model should not wait for.

They touch only slots they were handed: destinations of a reservation, or sources that will not change any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from disagg.kernels import native
from disagg.kernels.digest import digest
from disagg.transceiver.layout.units import HashedUnit, SourceUnit
from disagg.transceiver.memory.hashing import AfterCopy, Hasher, NoHasher
from disagg.transceiver.memory.regions import LandingJob, PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.protocol.events import LandedUnit
from disagg.transceiver.wire.errors import SourceChanged


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of a job: every unit, hashed where it now lies, the copies it took, and numbers beyond our format."""

    units: tuple[LandedUnit, ...]
    num_operations: int
    num_saturated: int = 0


LANDING_THREADS: Final = 2 if native.is_loaded() or (os.cpu_count() or 1) >= 4 else 1
"""Copying, hashing and looking for Inf keep one core busier than the memory: a second thread brings a transfer of
128 MiB from 16.5 to 13.3 ms on two cores, a third would find no bandwidth left. Without the compiled helper both need
Python's lock, and on two cores the second takes the one that event loops and libzmq run on: 38 ms instead of 28."""

OnEnd = Callable[[LandingJob, "Future[Landed]"], None]


class LandingThreads:
    """Runs landing and digest jobs in the order they were submitted. Use it from one event loop."""

    def __init__(
        self,
        pools: Sequence[PoolRegion],
        dtypes: Sequence[str],
        *,
        after_copy: AfterCopy | None = None,
        digests: bool = True,
        num_threads: int = 1,
    ) -> None:
        """`dtypes[g]` is the torch dtype name of group g's KV.

        `after_copy` runs on the thread between a job's copy and its hash: tests flip a byte there. `digests` False
        (a benchmark's right only) hashes and checks nothing, on this side or that: every digest is 0. With several
        threads jobs start in order and end as they may: no two share a slot.
        """
        self._pools = tuple(pools)
        self._dtypes = tuple(dtypes)
        self._after_copy = after_copy
        self._digests = digests
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="landing")
        self._jobs: dict[tuple[str, int], set[Future[Any]]] = {}
        self._heard: set[Future[Any]] = set()
        """Of those, the ones of `begin` that `stop` did not know: their ends are told."""

    async def submit(self, job: LandingJob, plane: LandingPlane) -> Landed:
        """Land a slice that `plane.fetch` has seen, and hash every unit where it now lies.

        Raises what `plane.land` raises. Ends in `CancelledError` when `stop` removed it. Cancelling the caller removes
        a queued job; a running one goes on to its end, and until `stop` returned it may write its destinations.
        """
        future = self._start(job, plane)
        try:
            return await asyncio.wrap_future(future)
        finally:
            if future.done():
                self._forget(job, future)

    def begin(self, job: LandingJob, plane: LandingPlane, on_end: OnEnd) -> None:
        """As `submit`, without a task: `on_end(job, landed)` on the loop, not called for a job that `stop` knew.

        `landed` raises at `result()` what `plane.land` raised.
        """
        loop = asyncio.get_running_loop()

        def ended(future: Future[Landed]) -> None:
            if not future.cancelled():
                with contextlib.suppress(RuntimeError):  # the loop ended first
                    loop.call_soon_threadsafe(tell, future)

        def tell(future: Future[Landed]) -> None:
            self._forget(job, future)
            if future in self._heard:
                self._heard.discard(future)
                on_end(job, future)

        future = self._start(job, plane)
        self._heard.add(future)
        future.add_done_callback(ended)

    async def digest_units(self, units: Sequence[SourceUnit], cut: SlotUnits | None = None) -> tuple[HashedUnit, ...]:
        """Hash final units of this process; with `cut`, slots of it as units of a peer whose blocks differ.

        Raises `SourceChanged` when a slot was given away meanwhile.
        """
        return await asyncio.wrap_future(self._executor.submit(self._digest, tuple(units), cut))

    async def stop(self, transfer_id: str, epoch: int) -> None:
        """Remove this epoch's queued jobs and join its running one: afterwards no job holds its destination slots."""
        key = (transfer_id, epoch)
        self._heard -= self._jobs.get(key, set())
        running = [future for future in self._jobs.get(key, ()) if not future.cancel()]
        # The caller of `submit` hears of errors; here only the end matters.
        await asyncio.gather(*map(asyncio.wrap_future, running), return_exceptions=True)
        self._jobs.pop(key, None)

    async def close(self) -> None:
        """Stop every job and end the thread. Safe to repeat."""
        for transfer_id, epoch in tuple(self._jobs):
            await self.stop(transfer_id, epoch)
        await asyncio.get_running_loop().run_in_executor(None, lambda: self._executor.shutdown(cancel_futures=True))

    def _start(self, job: LandingJob, plane: LandingPlane) -> Future[Landed]:
        future = self._executor.submit(self._land, job, plane)
        self._jobs.setdefault((job.transfer_id, job.epoch), set()).add(future)
        return future

    def _forget(self, job: LandingJob, future: Future[Any]) -> None:
        key = (job.transfer_id, job.epoch)
        futures = self._jobs.get(key, set())
        futures.discard(future)
        if not futures:
            self._jobs.pop(key, None)

    # --- on the thread ----------------------------------------------------------------------------------------

    def _land(self, job: LandingJob, plane: LandingPlane) -> Landed:
        make = Hasher if self._digests else NoHasher
        hasher = make(job, self._pools, self._dtypes, self._after_copy)
        num_saturated = plane.land_and_hash(job, hasher)
        return Landed(hasher.landed(), plane.num_copies(job), num_saturated)

    def _digest(self, units: Sequence[SourceUnit], cut: SlotUnits | None) -> tuple[HashedUnit, ...]:
        if cut is None:
            return tuple(self._digest_unit(unit) for unit in units)
        return tuple(
            HashedUnit(
                unit.group,
                unit.ordinal,
                unit.pool,
                unit.slot,
                unit.generation,
                digest(row.data) if self._digests else 0,
            )
            for few in cut.slices(cut.split(units))
            for unit, row in cut.pack(few).pairs(few)
        )

    def _digest_unit(self, unit: SourceUnit) -> HashedUnit:
        pool = self._pools[unit.pool]
        value = digest(pool.slots[unit.slot]) if self._digests else 0
        if int(pool.generations[unit.slot]) != unit.generation:  # after: a change during the hash counts too
            raise SourceChanged(
                f"group {unit.group}, block {unit.ordinal}: its slot was given away before it was hashed"
            )
        return HashedUnit(unit.group, unit.ordinal, unit.pool, unit.slot, unit.generation, value)
