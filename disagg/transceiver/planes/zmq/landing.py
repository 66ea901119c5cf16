"""The receiver's end of the zmq plane: keeps slices that arrived until they are landed, within the window of credit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import zmq

from disagg.transceiver.layout.runs import adjacent, ints
from disagg.transceiver.layout.slice_size import SLICE_NBYTES
from disagg.transceiver.memory.copying import copy_rows
from disagg.transceiver.memory.regions import Bytes, LandingJob, PoolRegion
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.unasked import KEEP_S, EndedEpochs
from disagg.transceiver.planes.zmq.frames import (
    REFUSED,
    WELCOME,
    WINDOW,
    Credit,
    DataHello,
    ProbeRequest,
    SliceHead,
    pack,
    parse,
)
from disagg.transceiver.wire.connection import Connection
from disagg.transceiver.wire.errors import (
    EndpointRefused,
    LocalProtocolError,
    PeerLost,
    PlaneRefused,
    RemoteProtocolError,
    Shortage,
)
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import Sockets

log = logging.getLogger(__name__)

OPEN_S: Final = 5.0
"""Connect, CURVE and hello: three round trips. Longer than `lost`, so a peer that stalls once is not given up here."""

Key = tuple[str, int, int]


@dataclass(slots=True)
class _Arrival:
    """One slice expected or here. `payload` is libzmq's own memory, freed with its last view."""

    here: asyncio.Event = field(default_factory=asyncio.Event)
    payload: Bytes | None = None
    expiry: asyncio.TimerHandle | None = None


class ZmqLandingPlane(LandingPlane):
    name = "zmq"

    def __init__(self, keys: ClusterKeys, sockets: Sockets | None = None) -> None:
        """`sockets`: of this process, closed by the caller after the plane; without it the plane makes its own."""
        self._keys, self._shared = keys, sockets
        self._pools: tuple[PoolRegion, ...] = ()
        self._arrivals: dict[Key, _Arrival] = {}
        self._discarded: EndedEpochs[tuple[str, int]] = EndedEpochs()
        self._owned: Sockets | None = None
        self._connection: Connection | None = None
        self._reading: asyncio.Task[None] | None = None
        self._is_lost = True
        self._claiming = threading.Lock()  # held for two assignments; `_arrivals` itself changes on the loop only
        self._num_held = 0
        self.num_malformed = 0
        self.num_discarded = 0

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        assert self._connection is None, "a landing plane connects once"
        self._loop = asyncio.get_running_loop()
        self._pools = tuple(pools)
        largest = max((region.slots.shape[1] for region in pools), default=0)
        try:
            self._connection = self._begin(offer.address, max(SLICE_NBYTES, largest))
        except EndpointRefused as exc:
            self._let_go()
            raise PlaneRefused(f"zmq: {exc}") from exc
        except Shortage:
            self._let_go()
            raise
        try:
            await self._say_hello(me, offer.token)
        except BaseException:
            await self.close()
            raise
        self._is_lost = False
        self._reading = asyncio.create_task(self._read(), name=f"zmq plane of {me}")

    def _begin(self, address: str, max_message_nbytes: int) -> Connection:
        sockets = self._shared
        if sockets is None:
            sockets = self._owned = Sockets(self._keys)
        return Connection(
            sockets,
            address,
            max_message_nbytes=max_message_nbytes,
            high_water_mark=2 * WINDOW,
            carries_data=True,
        )

    def _let_go(self) -> None:
        if self._owned is not None:
            self._owned.close()
        self._owned, self._connection, self._pools = None, None, ()

    async def _say_hello(self, me: str, token: bytes) -> None:
        connection = self._connection
        assert connection is not None
        try:
            async with asyncio.timeout(OPEN_S):
                await connection.ready()
                connection.send([pack(DataHello(me, token))])
                answer = await connection.receive()
        except TimeoutError as exc:
            raise PeerLost(f"zmq: {connection.endpoint} did not answer within {OPEN_S:g} s") from exc
        if [frame.bytes for frame in answer] != [WELCOME]:
            raise PlaneRefused("zmq: the token is not the one offered to this peer, or was used before")

    async def ask_probe(self) -> None:
        self._say(pack(ProbeRequest()))

    def _say(self, head: bytes) -> None:
        if self._connection is not None:
            with contextlib.suppress(PeerLost):  # `fetch` and `_read` hear of it too
                self._connection.send([head])

    async def fetch(self, job: LandingJob) -> None:
        """Wait until the slice's bytes are in this process. Raises `PeerLost`."""
        key = (job.transfer_id, job.epoch, job.number)
        if self._is_lost:
            raise PeerLost(f"the source {job.source} of this zmq plane is gone")
        arrival = self._arrivals.setdefault(key, _Arrival())
        try:
            await arrival.here.wait()
        finally:
            if arrival.payload is None and self._arrivals.get(key) is arrival:  # cancelled, or lost
                del self._arrivals[key]
        if arrival.payload is None:
            raise PeerLost(f"the source {job.source} of this zmq plane is gone")

    def land(self, job: LandingJob) -> int:
        """Copy a fetched slice into its slots; its memory goes and its credit returns, whatever the outcome."""
        key = (job.transfer_id, job.epoch, job.number)
        payload = self._claim(key)
        if payload is None:
            raise LocalProtocolError("this slice was not fetched, or was discarded")
        try:
            return self._scatter(job, payload)
        finally:
            del payload
            self._loop.call_soon_threadsafe(self._release, key)

    def _scatter(self, job: LandingJob, payload: Bytes) -> int:
        units = job.destinations
        sizes = [self._pools[unit.pool].slots.shape[1] for unit in units]
        if sum(sizes) != payload.nbytes:
            raise RemoteProtocolError(f"slice {job.number} has {payload.nbytes} bytes, its units {sum(sizes)}")
        offset = 0
        for start, stop in adjacent(ints([u.pool for u in units]), ints([u.slot for u in units])):
            target, count, nbytes = units[start].slot, stop - start, (stop - start) * sizes[start]
            rows = payload[offset : offset + nbytes].reshape(count, sizes[start])
            copy_rows(self._pools[units[start].pool].slots[target : target + count], rows)
            offset += nbytes
            self._count_operations(1)
        return offset

    def discard(self, transfer_id: str, epoch: int) -> None:
        """Also drops what is still under way to this epoch, when it arrives."""
        self._discarded.add((transfer_id, epoch))
        for key in [key for key in self._arrivals if key[:2] == (transfer_id, epoch)]:
            self._drop(key)

    async def close(self) -> None:
        connection = self._connection
        if connection is None:
            return
        self._is_lost = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        for key, arrival in tuple(self._arrivals.items()):
            self._drop(key)
            arrival.here.set()
        await connection.close()
        self._let_go()

    # --- arrivals ---------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        assert self._connection is not None
        try:
            while True:
                self._take(await self._connection.receive())
        except Exception as exc:
            if not isinstance(exc, PeerLost):
                log.error("data plane zmq cannot take a slice", exc_info=exc)
            self._is_lost = True
            for arrival in self._arrivals.values():
                arrival.here.set()
            if self.on_lost is not None:
                self.on_lost()

    def _take(self, frames: list[zmq.Frame]) -> None:
        if frames[0].bytes == REFUSED:
            raise PeerLost("the source dropped this receiver")
        try:
            head = parse(frames[0].bytes)
            if not isinstance(head, SliceHead) or len(frames) != 2 or len(frames[1]) != head.nbytes:
                raise RemoteProtocolError("not a slice")
        except RemoteProtocolError as exc:
            self.num_malformed += 1
            raise PeerLost(f"the source sent what is no slice: {exc}") from exc
        key = (head.transfer_id, head.epoch, head.number)
        if key[:2] in self._discarded:
            self.num_discarded += 1
            self._grant()
            return
        arrival = self._arrivals.setdefault(key, _Arrival())
        if arrival.here.is_set() or self._num_held == WINDOW:
            self.num_malformed += 1  # sent twice, or without credit
            return
        self._num_held += 1
        arrival.payload = np.frombuffer(frames[1].buffer, dtype=np.uint8)
        arrival.expiry = self._loop.call_later(KEEP_S, self._drop, key)
        arrival.here.set()

    def _drop(self, key: Key) -> None:
        """Discard an arrival, unless the landing thread was faster."""
        if self._claim(key) is not None:
            self.num_discarded += 1
            self._release(key)

    def _claim(self, key: Key) -> Bytes | None:
        """Take the payload. Only one of landing thread and loop gets it, and that one releases the key."""
        with self._claiming:
            arrival = self._arrivals.get(key)
            if arrival is None:
                return None
            payload, arrival.payload = arrival.payload, None
            return payload

    def _release(self, key: Key) -> None:
        """On the loop: the payload is gone from memory."""
        expiry = self._arrivals.pop(key).expiry
        if expiry is not None:
            expiry.cancel()
        self._num_held -= 1
        self._grant()

    def _grant(self) -> None:
        self._say(pack(Credit(1)))
