"""The receiver's end of the tcp plane: bytes go from the kernel straight into their slots, on a thread of their own.

A slice can be read only when its slots are known, so the thread reads a header and then waits until `fetch` has named
them; meanwhile the kernel's buffers fill and the sender waits. What belongs to an epoch that ended is read and thrown
away, at most one slice of 8 MiB at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from disagg.transceiver.layout.runs import ints
from disagg.transceiver.layout.slice_size import SLICE_NBYTES
from disagg.transceiver.memory.regions import LandingJob, PoolRegion
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.door import knock
from disagg.transceiver.planes.slice_stream import (
    HEADER,
    MAX_VECTORS,
    PROBE,
    SliceHeader,
    advance,
    check_size,
    run_views,
    wire_name,
)
from disagg.transceiver.planes.unasked import KEEP_S, EndedEpochs
from disagg.transceiver.planes.waits import end_wait
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, RemoteProtocolError, Shortage
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S

T = TypeVar("T")

DRAIN_NBYTES: Final = 256 << 10
"""Thrown-away bytes are read into one buffer of this size: it stays in the cache."""

WAKE_NBYTES: Final = 512 << 10
"""The kernel wakes this thread when so much has arrived, not for every segment: a wake-up costs as much as 100 KiB."""

Name = tuple[bytes, int]


@dataclass(slots=True)
class _Expected:
    """A slice that `fetch` waits for. `views`: what is left to fill; None once nothing may be written any more."""

    nbytes: int
    num_operations: int
    views: list[memoryview] | None
    here: asyncio.Future[None] = field(repr=False)


class TcpLandingPlane(LandingPlane):
    name = "tcp"
    is_private = False

    def __init__(self) -> None:
        self._pools: tuple[PoolRegion, ...] = ()
        self._socket: socket.socket | None = None
        self._expected: dict[tuple[Name, int], _Expected] = {}
        self._awaited: dict[tuple[Name, int], asyncio.Future[None]] = {}
        """Slices that `arrive` waits for."""
        self._landing_lock = threading.Lock()  # landing threads take out of `_landable` what the loop put in
        self._landable: dict[tuple[Name, int], _Expected] = {}
        self._discarded: EndedEpochs[Name] = EndedEpochs()
        self._is_lost = True
        self._is_listening, self._heard_at = False, 0.0  # written by the thread, for `_check_silence`
        self._is_awaiting = False  # written by the thread: whether it waits for a `fetch`
        self._next: tuple[Name, int] | None = None  # written by the thread: what it waits for
        # Held by the thread for one read that does not block, so that its holder knows that no slot is written.
        self._turn = threading.Condition()
        self.num_discarded = 0

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        assert self._socket is None, "a landing plane connects once"
        self._loop = asyncio.get_running_loop()
        self._pools = tuple(pools)
        self._limit = max(SLICE_NBYTES, *(region.slots.shape[1] for region in pools), 0)
        self._socket = await knock(me, offer)
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, args=(self._socket,), name="tcp-land", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:
            self._socket.close()
            self._socket, self._is_lost = None, True
            raise Shortage(f"tcp: {exc}") from exc

    async def ask_probe(self) -> None:
        assert self._socket is not None, "connect comes first"
        with contextlib.suppress(OSError):  # the source left: `fetch` hears of it too
            self._socket.send(PROBE)

    async def arrive(self, job: LandingJob) -> None:
        """Wait until the slice's header has come: all before it in the stream has been read. Raises `PeerLost`."""
        self._check_open(job)
        key, asked_at = self._key(job), time.monotonic()
        here = self._awaited[key] = self._loop.create_future()
        if self._next == key:  # after the entry: the thread looks for one after it said what comes next
            here.set_result(None)
        try:
            await self._until(here, asked_at)
        finally:
            del self._awaited[key]

    async def fetch(self, job: LandingJob) -> None:
        """Wait until the slice lies in its slots. Raises `PeerLost`, or `RemoteProtocolError` for one of another size.

        When this was cancelled nothing writes the job's slots any more.
        """
        self._check_open(job)
        key, expected = self._key(job), self._expect(job)
        asked_at = time.monotonic()
        self._expected[key] = expected
        if self._is_awaiting:  # else the thread looks before it waits; its turn may last as long as a read
            with self._turn:
                self._turn.notify()
        try:
            await self._until(expected.here, asked_at)
        except BaseException:
            expected.here.cancel()  # no caller waits any more
            with self._turn:
                expected.views = None
            raise
        finally:
            self._expected.pop(key, None)
        with self._landing_lock:
            self._landable[key] = expected

    def _check_open(self, job: LandingJob) -> None:
        if self._is_lost:
            raise PeerLost(f"the source {job.source} of this tcp plane is gone")

    async def _until(self, here: asyncio.Future[None], since: float) -> None:
        """Wait for a future that the thread ends. A slice leaves its sender when it is announced: nothing at all for
        `LOST_S` means that the link is dead."""
        while not (await asyncio.wait({here}, timeout=HEARTBEAT_S))[0]:
            self._check_silence(since)
        here.result()

    def _check_silence(self, since: float) -> None:
        if self._is_listening and time.monotonic() - max(since, self._heard_at) > LOST_S:
            self._lose()

    def _expect(self, job: LandingJob) -> _Expected:
        pools, slots = ints([u.pool for u in job.destinations]), ints([u.slot for u in job.destinations])
        views = run_views(self._pools, pools, slots)
        return _Expected(sum(map(len, views)), len(views), views, self._loop.create_future())

    def land(self, job: LandingJob) -> int:
        """The bytes lie in their slots already: only counts them."""
        with self._landing_lock:
            expected = self._landable.pop(self._key(job), None)
        if expected is None:
            raise LocalProtocolError("this slice was not fetched, or was discarded")
        self._count_operations(expected.num_operations)
        return expected.nbytes

    def discard(self, transfer_id: str, epoch: int) -> None:
        """Also throws away what is still under way to this epoch, when it arrives."""
        name = wire_name(transfer_id, epoch)
        with self._turn:
            self._discarded.add(name)
            self._turn.notify()
        with self._landing_lock:
            for key in [key for key in self._landable if key[0] == name]:
                del self._landable[key]

    async def close(self) -> None:
        if self._socket is None:
            return
        with self._turn:
            self._is_lost = True
            self._turn.notify()
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        await self._loop.run_in_executor(None, self._thread.join)
        self._socket.close()
        self._socket, self._pools = None, ()
        self._fail_waiting()

    def _key(self, job: LandingJob) -> tuple[Name, int]:
        return wire_name(job.transfer_id, job.epoch), job.number

    def _lose(self) -> None:
        """On the loop: the source's end is gone."""
        if not self._is_lost:
            self._is_lost = True
            self._fail_waiting()
            if self.on_lost is not None:
                self.on_lost()

    def _fail_waiting(self) -> None:
        for here in (*self._awaited.values(), *(expected.here for expected in self._expected.values())):
            end_wait(here, PeerLost("the source of this tcp plane is gone"))

    # --- on the thread ----------------------------------------------------------------------------------------

    def _run(self, sock: socket.socket) -> None:
        reader = _Reader(sock)
        try:
            while (data := self._listen(reader.read_header)) is not None:
                header = SliceHeader.parse(data)
                check_size(header, self._limit)
                self._receive(reader, header)
        except (OSError, RemoteProtocolError):  # reset, or not our protocol: either way nothing more comes of it
            pass
        finally:
            with contextlib.suppress(RuntimeError):  # the loop ended first
                self._loop.call_soon_threadsafe(self._lose)

    def _receive(self, reader: _Reader, header: SliceHeader) -> None:
        expected = self._await_slots(header)
        if expected is None or expected.nbytes != header.nbytes:
            reader.drain(header.nbytes)
            self.num_discarded += 1
            if expected is not None:
                self._answer(expected.here, RemoteProtocolError(_mismatch(header, expected)))
            return
        left = header.nbytes
        while left:
            self._listen(lambda: reader.wait(left))  # noqa: B023 (called at once)
            with self._turn:
                if expected.views is None:  # cancelled: its slots may be another's now
                    break
                left -= reader.fill(expected.views)
        reader.drain(left)
        self._answer(expected.here, None)

    def _listen(self, read: Callable[[], T]) -> T:
        """`read`, while it is the link's fault if nothing comes."""
        self._heard_at, self._is_listening = time.monotonic(), True
        try:
            return read()
        finally:
            self._heard_at, self._is_listening = time.monotonic(), False

    def _await_slots(self, header: SliceHeader) -> _Expected | None:
        """What `fetch` said of this slice, or None when it is not wanted. Raises `OSError` when the plane is closed."""
        key = header.name, header.number
        until = time.monotonic() + KEEP_S
        with self._turn:
            self._is_awaiting, self._next = True, key  # before the look: what `fetch` adds after it is notified
            if (awaited := self._awaited.get(key)) is not None:
                self._answer(awaited, None)
            try:
                while (expected := self._expected.get(key)) is None:
                    left = until - time.monotonic()
                    if header.name in self._discarded or left <= 0:
                        return None
                    if self._is_lost:
                        raise OSError("closed")
                    self._turn.wait(left)
            finally:
                self._is_awaiting, self._next = False, None
            return expected

    def _answer(self, here: asyncio.Future[None], error: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended first
            self._loop.call_soon_threadsafe(end_wait, here, error)


class _Reader:
    """Reads one socket that does not block. Raises `OSError` when it ends in the middle of something."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._enough = 1
        self._header = bytearray(HEADER.size)
        self._waste = memoryview(bytearray(DRAIN_NBYTES))

    def wait(self, nbytes: int = 1) -> None:
        """Until something can be read: `nbytes`, or `WAKE_NBYTES` where that is less, or the end."""
        enough = min(nbytes, WAKE_NBYTES)
        if enough != self._enough:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
            self._enough = enough
        self._poll.poll()

    def fill(self, views: list[memoryview]) -> int:
        """Read into the front of `views`, and take off what was filled; returns bytes."""
        try:
            nbytes = self._sock.recvmsg_into(views[:MAX_VECTORS])[0]
        except BlockingIOError:
            return 0
        if nbytes == 0:
            raise ConnectionResetError("the source ended within a slice")
        advance(views, nbytes)
        return nbytes

    def read_header(self) -> bytearray | None:
        """The next header, or None at the end of the stream."""
        views = [memoryview(self._header)]
        self.wait()
        try:
            while views:
                self.fill(views)
                if views:
                    self.wait()
        except ConnectionResetError:
            return None
        return self._header

    def drain(self, nbytes: int) -> None:
        while nbytes:
            self.wait(nbytes)
            nbytes -= self.fill([self._waste[:nbytes]])


def _mismatch(header: SliceHeader, expected: _Expected) -> str:
    return f"slice {header.number} has {header.nbytes} bytes, its units {expected.nbytes}"
