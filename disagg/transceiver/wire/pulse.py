"""A sign of life from a thread of its own, so that a busy event loop is slow and not dead.

    event loop    turns; `LoopTurns` notes when
    pulse thread  owns one socket: says that this process lives, unless the loop hangs; hears that of the other end

Pulses have a connection of their own: they never queue behind a prompt or behind tokens, in no process and on no wire.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from math import ceil
from typing import Final

import zmq

from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.router import Pulse
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.timing import HEARTBEAT_S, HUNG_S

log = logging.getLogger(__name__)

MAX_PULSE_NBYTES: Final = 1 << 20
"""A pulse names the new requests of one step: 16,384 of them at 60 bytes each, far beyond any batch."""

HIGH_WATER_MARK: Final = 1024
"""Pulses queued per peer: two a second and one per step with new requests. A peer that reads none of them misses what
is old."""

MAX_AT_ONCE: Final = 256
"""Pulses read before this thread looks whether its own is due: some ms of a flood."""

Route = bytes


class LoopTurns:
    """When an event loop last turned, for other threads to read. Made and closed on that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn()

    @property
    def is_hung(self) -> bool:
        return time.monotonic() - self._at > HUNG_S

    def close(self) -> None:
        self._handle.cancel()

    def _turn(self) -> None:
        self._at = time.monotonic()
        self._handle = self._loop.call_later(HEARTBEAT_S / 2, self._turn)


def open_pulse_socket(sockets: Sockets, kind: int) -> zmq.Socket[bytes]:
    """Used by one thread at a time; handing it to another takes a lock or a joined thread between the two."""
    return sockets.open_for_thread(kind, max_message_nbytes=MAX_PULSE_NBYTES, high_water_mark=HIGH_WATER_MARK)


def send_pulse(socket: zmq.Socket[bytes], pulse: Pulse | bytes, route: Route | None = None) -> bool:
    """Queue it, or its bytes, without waiting. False when the other end is not connected or reads nothing."""
    data = pulse if isinstance(pulse, bytes) else encode(pulse)
    frames = [data] if route is None else [route, data]
    try:
        socket.send_multipart(frames, flags=zmq.DONTWAIT)
    except zmq.ZMQError:
        return False
    return True


class PulseThread:
    """Owns `socket` from `start` to `close`: calls `beat` every heartbeat and `hear` for each pulse that comes."""

    def __init__(
        self, socket: zmq.Socket[bytes], beat: Callable[[], None], hear: Callable[[Route, Pulse], None]
    ) -> None:
        self._socket, self._beat, self._hear = socket, beat, hear
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread, which is between two messages within microseconds, and its socket."""
        os.eventfd_write(self._closing, 1)
        self._thread.join()
        os.close(self._closing)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._closing, zmq.POLLIN)
        due = time.monotonic()
        try:
            while True:
                ready = dict(poller.poll(max(0, ceil((due - time.monotonic()) * 1000))))
                if self._closing in ready:
                    return
                if self._socket in ready:
                    self._take_some()
                if time.monotonic() >= due:
                    self._beat()
                    due = time.monotonic() + HEARTBEAT_S
        except zmq.ContextTerminated:
            pass  # the process's sockets end, and with them this one
        finally:
            self._socket.close()

    def _take_some(self) -> None:
        for _ in range(MAX_AT_ONCE):
            try:
                *route, data = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = decode(data)
            except RemoteProtocolError:
                continue  # a peer of the cluster with other words: what it says here decides nothing
            if isinstance(message, Pulse):
                self._hear(route[0] if route else b"", message)
