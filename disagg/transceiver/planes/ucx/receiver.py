"""The receiver's thread of the ucx plane: brings announced slices into staging, in order, and keeps them until claimed.

A slice is received whole into one row of staging, asked for or not. A row goes back when the slice was landed or
dropped, and never while UCX may write it: what is dropped on its way is received to the end first. No receive names a
pool's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.transceiver.memory.regions import Bytes
from disagg.transceiver.planes.greeting import HANDSHAKE_S
from disagg.transceiver.planes.slice_stream import HEADER, SliceHeader, check_size
from disagg.transceiver.planes.ucx.frames import (
    CREDIT,
    MAX_CHUNKS,
    PROBE,
    READY,
    WINDOW,
    chunk_tag,
    chunks,
    transfer_bits,
)
from disagg.transceiver.planes.ucx.port import Port
from disagg.transceiver.planes.ucx.thread import UcxThread
from disagg.transceiver.planes.unasked import KEEP_S, EndedEpochs
from disagg.transceiver.planes.waits import end_wait
from disagg.transceiver.wire.errors import PeerLost, RemoteProtocolError

MAX_ROWS: Final = 4
MAX_STAGING_NBYTES: Final = 64 << 20
"""Slices per source that have arrived, or are arriving, and were not landed: one being landed, one arriving, two so
that neither waits for the other. Rows are reused last in, first out, and memory is touched only as it is used. More
rows let UCX run ahead of the landing and out of the cache: with 8, a transfer of 128 MiB took a tenth longer."""

Name = tuple[bytes, int]
Key = tuple[Name, int]


@dataclass(slots=True, eq=False)
class Arrival:
    """A slice in staging, or on its way there."""

    key: Key
    nbytes: int
    row: int
    num_left: int
    here_at: float = 0.0


class UcxReceiver(UcxThread):
    """Receives from one source until it hangs up or `close`."""

    def __init__(
        self, sock: socket.socket, token: bytes, on_end: Callable[[UcxThread], None], max_slice_nbytes: int
    ) -> None:
        self._limit = max_slice_nbytes
        num_rows = max(2, min(MAX_ROWS, MAX_STAGING_NBYTES // max_slice_nbytes))
        self._staging = np.empty((num_rows, max_slice_nbytes), dtype=np.uint8)
        # The lock guards what follows; it is held for a few assignments.
        self._lock = threading.Lock()
        self._free = list(range(num_rows))
        self._here: dict[Key, Arrival] = {}
        self._wanted: dict[Key, asyncio.Future[None]] = {}
        self._discarded: EndedEpochs[Name] = EndedEpochs()
        self._is_starved = False
        self.heard_at = 0.0
        self.num_discarded = 0
        # Only the thread uses these.
        self._is_ready = False
        self._unread = b""
        self._announced: deque[SliceHeader] = deque()
        self._arriving: dict[Key, Arrival] = {}
        super().__init__("ucx-land", sock, token, on_end)

    def want(self, key: Key) -> asyncio.Future[None]:
        """Done when the slice is in staging, or `PeerLost`."""
        here: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            if key in self._here:
                self._here[key].here_at = float("inf")
                here.set_result(None)
            else:
                self._wanted[key] = here
        return here

    def unwant(self, key: Key) -> None:
        """No caller waits any more; a slice that is here waits to be claimed, or to be forgotten."""
        with self._lock:
            self._wanted.pop(key, None)

    def forsake(self, key: Key) -> None:
        """The waiting caller was cancelled: the slice counts as not asked for."""
        with self._lock:
            self._wanted.pop(key, None)
            if key in self._here:
                self._here[key].here_at = time.monotonic()

    def nbytes_of(self, key: Key) -> int | None:
        with self._lock:
            return self._here[key].nbytes if key in self._here else None

    def claim(self, key: Key) -> Arrival | None:
        """Take a slice that is here; `release` its row when it is landed."""
        with self._lock:
            return self._here.pop(key, None)

    def payload(self, arrival: Arrival) -> Bytes:
        return self._staging[arrival.row, : arrival.nbytes]

    def release(self, arrival: Arrival) -> None:
        """The row of a claimed slice is free again."""
        with self._lock:
            self._free.append(arrival.row)
            is_starved, self._is_starved = self._is_starved, False
        if is_starved:
            with contextlib.suppress(OSError):  # the thread has ended
                self.wake()

    def discard(self, name: Name) -> None:
        """Drop what is here of this epoch, and what is still to come."""
        with self._lock:
            self._discarded.add(name)
            keys = [key for key in self._here if key[0] == name]
        self.drop(keys)

    def drop(self, keys: list[Key]) -> None:
        for key in keys:
            arrival = self.claim(key)
            if arrival is not None:
                with self._lock:
                    self.num_discarded += 1
                self.release(arrival)

    @property
    def num_held(self) -> int:
        with self._lock:
            return len(self._here)

    @property
    def is_silent_since(self) -> float:
        """When the source was last heard; never silent while we have no room for what it wants to say."""
        return time.monotonic() if self._is_starved else self.heard_at

    def ask_probe(self) -> None:
        with contextlib.suppress(OSError):  # the source left: callers that fetch hear of it too
            self._sock.send(PROBE)

    def _ended(self, error: PeerLost) -> None:
        self.fail_waiting(str(error))

    def fail_waiting(self, reason: str) -> None:
        """On the loop: a caller that waits for a slice hears `PeerLost`."""
        with self._lock:
            waiting, self._wanted = list(self._wanted.values()), {}
        for here in waiting:
            end_wait(here, PeerLost(f"the source of this ucx plane is gone: {reason}"))

    # --- on the thread ----------------------------------------------------------------------------------------

    def _settle(self, port: Port) -> None:
        until = time.monotonic() + HANDSHAKE_S
        while not self._is_ready:
            if time.monotonic() > until:
                raise PeerLost("ucx: the source does not answer")
            self._turn(port, HANDSHAKE_S)

    def _serve(self, port: Port) -> None:
        while True:
            # Before sleeping: what was announced while UCX connected gives no further sign.
            while self._announced and self._begin(port, self._announced[0]):
                self._announced.popleft()
            self._forget_old()
            self._turn(port, KEEP_S if self._here else None)

    def _hear(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        data = self._unread + data
        if not self._is_ready and data:
            if data[:1] != READY:
                raise RemoteProtocolError("ucx: the source is not ready, and speaks")
            self._is_ready, data = True, data[1:]
        end = len(data) - len(data) % HEADER.size
        self._unread = data[end:]
        for start in range(0, end, HEADER.size):
            header = SliceHeader.parse(data[start : start + HEADER.size])
            check_size(header, self._limit)
            self._announced.append(header)
        if len(self._announced) + len(self._arriving) > WINDOW:
            raise RemoteProtocolError("ucx: more slices than the window allows")

    def _begin(self, port: Port, header: SliceHeader) -> bool:
        """Post the receives of a slice, when there is room for it."""
        key = header.name, header.number
        with self._lock:
            if not self._free:
                self._is_starved = True
                return False
            if key in self._here or key in self._arriving:
                raise RemoteProtocolError("ucx: a slice was sent twice")
            row = self._free.pop()
        parts = chunks(header.nbytes)
        arrival = self._arriving[key] = Arrival(key, header.nbytes, row, len(parts))
        if not parts:
            self._finish(arrival)
        bits = transfer_bits(self._token, header.name)
        for chunk, (start, stop) in enumerate(parts[:MAX_CHUNKS]):
            tag = chunk_tag(bits, header.number, chunk)
            port.receive(self._staging[row, start:stop], tag, lambda: self._take_chunk(arrival))
        return True

    def _take_chunk(self, arrival: Arrival) -> None:
        self.heard_at = time.monotonic()
        arrival.num_left -= 1
        if not arrival.num_left:
            self._finish(arrival)

    def _finish(self, arrival: Arrival) -> None:
        del self._arriving[arrival.key]
        with self._lock:
            is_wanted = arrival.key[0] not in self._discarded
            here = self._wanted.get(arrival.key)
            arrival.here_at = time.monotonic() if here is None else float("inf")
            if is_wanted:
                self._here[arrival.key] = arrival
            else:
                self._free.append(arrival.row)
                self.num_discarded += 1
        self._say(CREDIT)
        if here is not None and is_wanted:
            self._call(end_wait, here, None)

    def _forget_old(self) -> None:
        old = time.monotonic() - KEEP_S
        with self._lock:
            keys = [key for key, arrival in self._here.items() if arrival.here_at < old]
        self.drop(keys)
