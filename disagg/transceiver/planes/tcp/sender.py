"""One receiver's connection at the sender of the tcp plane: a thread that writes slices in the order they came."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from disagg.transceiver.planes.slice_stream import MAX_VECTORS, PROBE, SliceHeader, advance
from disagg.transceiver.planes.waits import end_wait
from disagg.transceiver.wire.errors import PeerLost, TransceiverError


@dataclass(frozen=True, slots=True)
class _Job:
    header: bytes
    views: list[memoryview]
    check: Callable[[], None]
    sent: asyncio.Future[None]


_Sent = tuple[asyncio.Future[None], TransceiverError | None]


class TcpSender:
    """Writes to `sock`, which it owns, until the receiver hangs up or `close`."""

    def __init__(self, sock: socket.socket, on_lost: Callable[[TcpSender], None], on_probe: Callable[[], None]) -> None:
        """Both are called on the loop, once: when the other end is gone, and when it asks for the probe."""
        self._sock = sock
        self._on_lost, self._on_probe = on_lost, on_probe
        self._is_probed = False
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._is_lost = False
        sock.setblocking(True)
        self._loop.add_reader(sock, self._hear)
        self._thread = threading.Thread(target=self._run, name="tcp-send", daemon=True)
        self._thread.start()

    async def send(self, header: SliceHeader, views: list[memoryview], check: Callable[[], None]) -> None:
        """Write one slice; `check` runs before its first byte and after its last. Raises `PeerLost` or what it raises.

        Cancelling the caller does not: the slice goes out whole, as the receiver expects.
        """
        if self._is_lost:
            raise PeerLost("the decode worker closed the tcp plane")
        job = _Job(header.pack(), views, check, self._loop.create_future())
        self._jobs.put(job)
        await job.sent

    async def close(self) -> None:
        """Hang up, end the thread, fail what was not sent. Safe to repeat."""
        if not self._is_lost:
            self._lose()
        self._jobs.put(None)
        await self._loop.run_in_executor(None, self._thread.join)
        self._sock.close()

    def _hear(self) -> None:
        """A receiver may ask for the probe, once; anything else that can be read means that it hung up."""
        said = b""
        with contextlib.suppress(OSError):
            said = self._sock.recv(1, socket.MSG_DONTWAIT)
        if said == PROBE and not self._is_probed:
            self._is_probed = True
            self._on_probe()
            return
        self._lose()
        self._on_lost(self)

    def _lose(self) -> None:
        self._is_lost = True
        self._loop.remove_reader(self._sock)
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # ends a blocked write

    # --- on the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        sent: list[_Sent] = []
        while (job := self._jobs.get()) is not None:
            sent.append((job.sent, self._write(job)))
            if self._jobs.empty() or sent[-1][1] is not None:  # one wake-up of the loop for all that waited
                self._tell(sent)
                sent = []
        self._tell(sent)

    def _write(self, job: _Job) -> TransceiverError | None:
        try:
            job.check()
            write(self._sock, [memoryview(job.header), *job.views])
            job.check()
        except OSError as exc:
            return PeerLost(f"the decode worker closed the tcp plane: {exc.strerror or exc}")
        except TransceiverError as exc:
            return exc
        return None

    def _tell(self, sent: list[_Sent]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended first, as in a process that is being torn down
            self._loop.call_soon_threadsafe(_resolve, sent)


def write(sock: socket.socket, views: list[memoryview]) -> None:
    """Write all of `views`. Raises `OSError`."""
    while views:
        advance(views, sock.sendmsg(views[:MAX_VECTORS]))


def _resolve(sent: list[_Sent]) -> None:
    for future, error in sent:
        end_wait(future, error)
