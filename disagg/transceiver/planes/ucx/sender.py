"""One receiver's connection at the sender of the ucx plane: gathers slices into chunks and sends them, in order."""

from __future__ import annotations

import asyncio
import functools
import queue
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.transceiver.memory.copying import copy_rows
from disagg.transceiver.memory.regions import Bytes
from disagg.transceiver.planes.slice_stream import SliceHeader
from disagg.transceiver.planes.ucx.frames import (
    CHUNK_NBYTES,
    CREDIT,
    PROBE,
    READY,
    WINDOW,
    chunk_tag,
    chunks,
    transfer_bits,
)
from disagg.transceiver.planes.ucx.port import Port
from disagg.transceiver.planes.ucx.thread import UcxThread
from disagg.transceiver.planes.waits import end_wait
from disagg.transceiver.wire.errors import PeerLost, RemoteProtocolError, SourceChanged

DEPTH: Final = 4
"""Chunks gathered and not yet taken: one being filled, one being read, two so that neither end waits for the other.
8 MiB per receiver, which stay in the cache."""


@dataclass(frozen=True, slots=True)
class _Job:
    header: SliceHeader
    views: Sequence[Bytes]
    check: Callable[[], None]
    sent: asyncio.Future[None]


class UcxSender(UcxThread):
    """Sends to one receiver until it hangs up or `close`."""

    def __init__(
        self,
        sock: socket.socket,
        token: bytes,
        on_end: Callable[[UcxThread], None],
        on_probe: Callable[[], None],
    ) -> None:
        self._on_probe, self._is_probed = on_probe, False
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._waiting: set[asyncio.Future[None]] = set()
        self._is_lost = False
        self._window = WINDOW
        self._staging = np.empty((DEPTH, CHUNK_NBYTES), dtype=np.uint8)
        self._free = list(range(DEPTH))
        super().__init__("ucx-send", sock, token, on_end)

    async def send(self, header: SliceHeader, views: list[memoryview], check: Callable[[], None]) -> None:
        """Send one slice; returns when all of it is gathered. `check` runs before its first byte and after its last.

        Raises `PeerLost` or what `check` raises. Cancelling the caller does not stop it: the slice goes out whole.
        """
        if self._is_lost:
            raise PeerLost("the decode worker closed the ucx plane")
        job = _Job(header, [np.frombuffer(view, np.uint8) for view in views], check, self._loop.create_future())
        self._waiting.add(job.sent)
        job.sent.add_done_callback(self._waiting.discard)
        self._jobs.put(job)
        self.wake()
        await job.sent

    def _ended(self, error: PeerLost) -> None:
        self._is_lost = True
        for sent in tuple(self._waiting):
            end_wait(sent, error)

    # --- on the thread ----------------------------------------------------------------------------------------

    def _settle(self, port: Port) -> None:
        # Ready before the receiver, so that no receiver is lost here unnoticed.
        self._call(end_wait, self.opened, None)
        self._say(READY)

    def _hear(self, data: bytes) -> None:
        for said in (data[i : i + 1] for i in range(len(data))):
            if said == CREDIT and self._window < WINDOW:
                self._window += 1
            elif said == PROBE and not self._is_probed:
                self._is_probed = True
                self._call(self._on_probe)
            else:
                raise RemoteProtocolError("ucx: credit for nothing, a second probe, or noise")

    def _serve(self, port: Port) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                self._turn(port)
                continue
            error: Exception | None = None
            try:
                self._send(port, job)
            except SourceChanged as exc:
                error = exc
            self._call(end_wait, job.sent, error)

    def _send(self, port: Port, job: _Job) -> None:
        while not self._window:
            self._turn(port)
        job.check()
        self._window -= 1
        self._say(job.header.pack())
        bits = transfer_bits(self._token, job.header.name)
        source = _Source(job.views)
        for chunk, (start, stop) in enumerate(chunks(job.header.nbytes)):
            while not self._free:
                self._turn(port)
            row = self._free.pop()
            data = self._staging[row, : stop - start]
            source.gather(data)
            tag = chunk_tag(bits, job.header.number, chunk)
            port.send(data, tag, functools.partial(self._free.append, row))
            port.nudge()
        job.check()


class _Source:
    """Bytes of a slice, taken from the front."""

    def __init__(self, views: Sequence[Bytes]) -> None:
        self._views = iter(views)
        self._view = np.empty(0, dtype=np.uint8)

    def gather(self, data: Bytes) -> None:
        """Fill `data` with the next bytes."""
        done = 0
        while done < len(data):
            if not len(self._view):
                self._view = next(self._views)
            nbytes = min(len(self._view), len(data) - done)
            copy_rows(data[done : done + nbytes], self._view[:nbytes])
            self._view = self._view[nbytes:]
            done += nbytes
