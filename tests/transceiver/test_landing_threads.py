"""The landing thread: what it reports is what lies in the destination, and a stopped epoch writes no more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import xxhash
from support.event_loop import PATIENCE_S, in_event_loop, within
from support.links.plane_pair import PlanePair, Receiver, plane_pair
from support.links.pools import close_pools, make_pools

from disagg.kernels import native
from disagg.transceiver.layout.units import HashedUnit, SourceUnit
from disagg.transceiver.memory.hashing import PIECE_NBYTES
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.peers.landing_threads import AfterCopy, LandingThreads
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.inproc import InprocLandingPlane
from disagg.transceiver.protocol.events import LandedUnit
from disagg.transceiver.wire.errors import SourceChanged

DTYPES = ("float32", "float16")
PAIRS = [(0, 4, 10), (0, 5, 11), (1, 3, 2), (0, 9, 0)]


@asynccontextmanager
async def a_landing(
    kind: str = "inproc", after_copy: AfterCopy | None = None
) -> AsyncIterator[tuple[PlanePair, Receiver, LandingThreads]]:
    """A plane whose source slots hold zeros, so that they are finite in any dtype; then slot s is filled with s."""
    async with plane_pair(kind) as pair:
        for pool in pair.pools:
            pool.slots[:] = np.arange(len(pool.slots), dtype=np.uint8)[:, None]
        receiver = await pair.receiver()
        landing = LandingThreads(receiver.pools, DTYPES, after_copy=after_copy)
        try:
            yield pair, receiver, landing
        finally:
            await landing.close()


@pytest.mark.parametrize("kind", ["inproc", "shm"])
@in_event_loop
async def test_digests_are_of_the_destination_and_in_slice_order(kind: str) -> None:
    async with a_landing(kind) as (pair, receiver, landing):
        landed = await within(landing.submit(pair.job(PAIRS), receiver.plane))
        assert landed.units == tuple(
            LandedUnit(pool, ordinal, xxhash.xxh3_64_intdigest(pair.pools[pool].slots[source].tobytes()))
            for ordinal, (pool, source, _) in enumerate(PAIRS)
        )


@in_event_loop
async def test_slices_that_wait_for_each_other_count_their_own_copies() -> None:
    async with a_landing() as (pair, receiver, landing):
        alone = (await within(landing.submit(pair.job(PAIRS), receiver.plane))).num_operations
        submitted = [landing.submit(pair.job(PAIRS, number=number), receiver.plane) for number in range(1, 4)]
        assert [landed.num_operations for landed in await within(asyncio.gather(*submitted))] == [alone] * 3
        assert alone > 0


@pytest.mark.parametrize("byte", [0, -1])
@in_event_loop
async def test_a_byte_flipped_after_the_copy_changes_that_units_digest_alone(byte: int) -> None:
    def flip(job: LandingJob, pools: Sequence[PoolRegion]) -> None:
        unit = job.destinations[1]
        pools[unit.pool].slots[unit.slot, byte] ^= 1

    async with a_landing(after_copy=flip) as (pair, receiver, landing):
        landed = await within(landing.submit(pair.job(PAIRS), receiver.plane))
        good = [xxhash.xxh3_64_intdigest(pair.pools[pool].slots[source].tobytes()) for pool, source, _ in PAIRS]
        is_good = [unit.digest == digest for unit, digest in zip(landed.units, good, strict=True)]
        assert is_good == [True, False, True, True]


@in_event_loop
async def test_a_unit_with_a_nan_is_reported_not_finite() -> None:
    async with a_landing() as (pair, receiver, landing):
        pair.pools[0].slots[5].view(np.float32)[-1] = np.nan
        pair.pools[1].slots[3].view(np.float16)[0] = -np.inf
        landed = await within(landing.submit(pair.job(PAIRS), receiver.plane))
        assert [unit.finite for unit in landed.units] == [True, False, False, True]


@in_event_loop
async def test_an_error_of_the_copy_reaches_who_submitted() -> None:
    async with a_landing() as (pair, receiver, landing):
        job = pair.job(PAIRS)
        pair.pools[0].generations[4] += 1
        with pytest.raises(SourceChanged):
            await within(landing.submit(job, receiver.plane))


@in_event_loop
async def test_units_of_the_sender_are_hashed_and_keep_their_slot_and_generation() -> None:
    pools = make_pools([(4, 4096)])
    landing = LandingThreads(pools, ["float32"])
    units = await within(landing.digest_units([SourceUnit(0, 7, 0, 2, 102), SourceUnit(0, 8, 0, 1, 101)]))
    assert units == (
        HashedUnit(0, 7, 0, 2, 102, xxhash.xxh3_64_intdigest(pools[0].slots[2].tobytes())),
        HashedUnit(0, 8, 0, 1, 101, xxhash.xxh3_64_intdigest(pools[0].slots[1].tobytes())),
    )
    with pytest.raises(SourceChanged, match="block 7"):
        await within(landing.digest_units([SourceUnit(0, 7, 0, 2, 99)]))
    await landing.close()
    close_pools(pools)


@in_event_loop
async def test_a_job_begun_without_a_task_reports_its_end_once_and_none_that_was_stopped() -> None:
    async with a_gated_landing() as (landing, plane):
        ended: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        for epoch, number in ((1, 0), (1, 1), (2, 0)):
            landing.begin(job("t", epoch, number), plane, lambda job, _: ended.put_nowait((job.epoch, job.number)))
        await asyncio.to_thread(plane.started.wait, PATIENCE_S)
        threading.Timer(0.05, plane.go_on.set).start()
        await within(landing.stop("t", 1))
        assert await within(ended.get()) == (2, 0)  # of another epoch, which nobody stopped
        assert ended.empty()
        assert not landing._jobs
        assert not landing._heard


class GatedPlane(LandingPlane):
    """Lands when it is told to, and keeps the order in which jobs ran."""

    name = "gated"

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.landed: list[tuple[str, int, int]] = []

    async def connect(self, me, offer, pools) -> None: ...
    async def fetch(self, job: LandingJob) -> None: ...

    def land(self, job: LandingJob) -> int:
        self.started.set()
        assert self.go_on.wait(5)
        self.landed.append((job.transfer_id, job.epoch, job.number))
        return 0

    def discard(self, transfer_id: str, epoch: int) -> None: ...
    async def close(self) -> None: ...


@asynccontextmanager
async def a_gated_landing() -> AsyncIterator[tuple[LandingThreads, GatedPlane]]:
    pools = make_pools([(4, 64)])
    pools[0].slots[:] = 0
    landing, plane = LandingThreads(pools, ["float32"]), GatedPlane()
    try:
        yield landing, plane
    finally:
        plane.go_on.set()
        await landing.close()
        close_pools(pools)


def job(transfer_id: str, epoch: int, number: int) -> LandingJob:
    return LandingJob("source", transfer_id, epoch, number, (Destination(0, 0, 0, 2),))


@in_event_loop
async def test_stopping_an_epoch_joins_its_running_job_and_removes_its_queued_ones() -> None:
    async with a_gated_landing() as (landing, plane):
        running, queued, other = (
            asyncio.create_task(landing.submit(work, plane))
            for work in (job("t", 1, 0), job("t", 1, 1), job("t", 2, 0))
        )
        await asyncio.to_thread(plane.started.wait, PATIENCE_S)
        stopping = asyncio.create_task(landing.stop("t", 1))
        await asyncio.sleep(0.02)
        assert not stopping.done()  # the running job still holds its slots
        plane.go_on.set()
        await within(stopping)
        assert ("t", 1, 0) in plane.landed
        await within(asyncio.wait({running, queued, other}))
        assert queued.cancelled()
        assert not running.cancelled()
        assert not other.cancelled()
        assert plane.landed == [("t", 1, 0), ("t", 2, 0)]


@in_event_loop
async def test_stop_joins_a_job_whose_caller_was_cancelled() -> None:
    async with a_gated_landing() as (landing, plane):
        running = asyncio.create_task(landing.submit(job("t", 1, 0), plane))
        await asyncio.to_thread(plane.started.wait, PATIENCE_S)
        running.cancel()
        await within(asyncio.wait({running}))
        threading.Timer(0.05, plane.go_on.set).start()
        await within(landing.stop("t", 1))
        assert plane.landed == [("t", 1, 0)]


@in_event_loop
async def test_stopping_what_is_not_there_returns_at_once() -> None:
    async with a_gated_landing() as (landing, _):
        await within(landing.stop("t", 1))


@in_event_loop
async def test_a_landing_job_does_not_hold_up_the_loop() -> None:
    async with a_gated_landing() as (landing, plane):
        running = asyncio.create_task(landing.submit(job("t", 1, 0), plane))
        await asyncio.to_thread(plane.started.wait, PATIENCE_S)
        for _ in range(10):
            await asyncio.sleep(0)  # the loop turns while the job stands at its gate
        assert not running.done()


@in_event_loop
async def test_finished_jobs_are_forgotten_and_close_may_be_repeated() -> None:
    async with a_landing() as (pair, receiver, landing):
        for number in range(3):
            await within(landing.submit(pair.job(PAIRS, number=number), receiver.plane))
        assert landing._jobs == {}
        await landing.close()
        await landing.close()


@pytest.mark.parametrize("helper", ["compiled", "none"])
@pytest.mark.parametrize("num_threads", [1, 3])
@in_event_loop
async def test_slots_of_many_pieces_are_hashed_whole_and_one_bad_number_is_found_in_any_piece(
    num_threads: int, helper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an oracle that knows nothing of pieces."""
    if helper == "none":
        monkeypatch.setattr(native, "_library", None)
    elif not native.is_loaded():
        pytest.skip("the compiled helper is not built: no C compiler when the package was installed")
    async with plane_pair("shm") as pair:
        slot_nbytes = 2 * PIECE_NBYTES + 4096
        pools, sources = make_pools([(6, slot_nbytes)], seed=1), make_pools([(6, slot_nbytes)], seed=2)
        sources[0].slots[:] &= 0x3F
        bad = {1: 0, 2: PIECE_NBYTES, 3: slot_nbytes - 4}
        for slot, at in bad.items():
            sources[0].slots[slot, at : at + 4].view(np.float32)[:] = np.inf
        plane = InprocLandingPlane(pair.hub)
        plane._open(sources, pools)
        landing = LandingThreads(pools, DTYPES, num_threads=num_threads)
        jobs = [
            LandingJob("source", "t", 1, number, (Destination(0, number, 0, 5 - number, number, 100 + number),))
            for number in range(5)
        ]
        landed = await within(asyncio.gather(*(landing.submit(job, plane) for job in jobs)))
        for number, one in enumerate(landed):
            expected = xxhash.xxh3_64_intdigest(sources[0].slots[number].tobytes())
            assert one.units == (LandedUnit(0, number, expected, number not in bad),)
            assert one.num_operations == 1
        assert np.array_equal(pools[0].slots[5:0:-1], sources[0].slots[:5])
        await landing.close()
        close_pools((*pools, *sources))
