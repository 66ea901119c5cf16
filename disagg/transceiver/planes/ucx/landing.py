"""The receiver's end of the ucx plane: slices come into staging; the landing thread copies them into their slots."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from disagg.transceiver.layout.runs import adjacent, ints
from disagg.transceiver.layout.slice_size import SLICE_NBYTES
from disagg.transceiver.memory.copying import copy_slots
from disagg.transceiver.memory.regions import Bytes, LandingJob, PoolRegion
from disagg.transceiver.planes.copying_plane import Copy, CopyingLandingPlane
from disagg.transceiver.planes.door import knock
from disagg.transceiver.planes.slice_stream import wire_name
from disagg.transceiver.planes.ucx.library import library
from disagg.transceiver.planes.ucx.receiver import Key, UcxReceiver
from disagg.transceiver.planes.ucx.thread import UcxThread
from disagg.transceiver.wire.errors import (
    EndpointRefused,
    LocalProtocolError,
    PeerLost,
    PlaneRefused,
    RemoteProtocolError,
    Shortage,
)
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S


class UcxLandingPlane(CopyingLandingPlane):
    name = "ucx"
    is_private = False

    def __init__(self) -> None:
        self._pools: tuple[PoolRegion, ...] = ()
        self._receiver: UcxReceiver | None = None
        self._is_lost = True

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        assert self._receiver is None, "a landing plane connects once"
        self._pools = tuple(pools)
        limit = max(SLICE_NBYTES, *(region.slots.shape[1] for region in pools), 0)
        try:
            await asyncio.to_thread(library)
        except EndpointRefused as exc:
            raise PlaneRefused(str(exc)) from exc
        sock = await knock(me, offer)
        try:
            self._receiver = UcxReceiver(sock, offer.token, self._lose, limit)
        except (OSError, RuntimeError, MemoryError) as exc:  # an eventfd, a thread or staging that cannot be had
            sock.close()
            raise Shortage(f"ucx: {exc}") from exc
        self._is_lost = False
        try:
            await self._receiver.opened
            if self._is_lost:
                raise PeerLost("ucx: the source hung up")
        except BaseException:
            await self.close()
            raise
        self.lane = self._receiver.lanes

    @property
    def _num_held(self) -> int:
        """Slices that have arrived and were not landed."""
        return self._receiver.num_held if self._receiver is not None else 0

    async def ask_probe(self) -> None:
        assert self._receiver is not None, "connect comes first"
        self._receiver.ask_probe()

    async def fetch(self, job: LandingJob) -> None:
        """Wait until the slice is in staging. Raises `PeerLost`, or `RemoteProtocolError` for one of another size."""
        receiver = self._receiver
        if self._is_lost or receiver is None:
            raise PeerLost(f"the source {job.source} of this ucx plane is gone")
        key, since = _key(job), time.monotonic()
        here = receiver.want(key)
        try:
            while not (await asyncio.wait({here}, timeout=HEARTBEAT_S))[0]:
                self._check_silence(receiver, since)
            here.result()
        except BaseException:
            here.cancel()
            receiver.forsake(key)
            raise
        receiver.unwant(key)
        arrived, expected = receiver.nbytes_of(key), sum(self._sizes(job))
        if arrived is not None and arrived != expected:
            receiver.drop([key])
            raise RemoteProtocolError(f"slice {job.number} has {arrived} bytes, its units {expected}")

    def _check_silence(self, receiver: UcxReceiver, since: float) -> None:
        """A slice leaves its sender when it is announced: nothing at all for `LOST_S` means that the link is dead. A
        chunk of 2 MiB counts when it is whole, so a network below 1 MB/s is too slow for this plane."""
        if time.monotonic() - max(since, receiver.is_silent_since) > LOST_S:
            self._lose(receiver)

    def land(self, job: LandingJob, copy: Copy | None = None) -> int:
        """Copy a fetched slice out of staging into its slots; its row goes back, whatever the outcome."""
        receiver = self._receiver
        arrival = receiver.claim(_key(job)) if receiver is not None else None
        if receiver is None or arrival is None:
            raise LocalProtocolError("this slice was not fetched, or was discarded")
        try:
            return self._scatter(job, receiver.payload(arrival), copy or copy_slots)
        finally:
            receiver.release(arrival)

    def _scatter(self, job: LandingJob, payload: Bytes, copy: Copy) -> int:
        units, sizes = job.destinations, ints(self._sizes(job))
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        staged = [_windows(payload, region) for region in self._pools]
        copy(self._pools, staged, pools, slots, np.cumsum(sizes) - sizes)
        self._count_operations(sum(1 for _ in adjacent(pools, slots)))
        return len(payload)

    def _sizes(self, job: LandingJob) -> list[int]:
        return [self._pools[unit.pool].slots.shape[1] for unit in job.destinations]

    def discard(self, transfer_id: str, epoch: int) -> None:
        """Also drops what is still under way to this epoch, when it arrives."""
        if self._receiver is not None:
            self._receiver.discard(wire_name(transfer_id, epoch))

    async def close(self) -> None:
        receiver = self._receiver
        if receiver is None:
            return
        self._is_lost = True
        await receiver.close()
        self._receiver, self._pools = None, ()

    def _lose(self, receiver: UcxThread) -> None:
        """On the loop: the source's end is gone."""
        if not self._is_lost and receiver is self._receiver:
            self._is_lost = True
            self._receiver.fail_waiting("no sign of it")
            if self.on_lost is not None:
                self.on_lost()


def _windows(payload: Bytes, region: PoolRegion) -> PoolRegion:
    """`payload` as a source of slots of this pool's size: number i begins at byte i, whatever lies before it."""
    nbytes = region.slots.shape[1]
    count = max(0, len(payload) - nbytes + 1)
    windows = np.lib.stride_tricks.as_strided(payload, (count, nbytes), (1, 1), writeable=False)
    return PoolRegion(windows, region.generations, -1, 0)


def _key(job: LandingJob) -> Key:
    return wire_name(job.transfer_id, job.epoch), job.number
