"""A connection of the ucx plane in either process: one thread that owns a port and the socket next to it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np

from disagg.transceiver.planes.greeting import HANDSHAKE_S
from disagg.transceiver.planes.ucx.frames import address_nbytes, chunk_tag, pack_address, transfer_bits
from disagg.transceiver.planes.ucx.port import Port
from disagg.transceiver.planes.waits import end_wait
from disagg.transceiver.wire.errors import EndpointRefused, PeerLost, RemoteProtocolError

log = logging.getLogger(__name__)

_HELLO: Final = (b"hello", 0)  # no transfer has this name: theirs are 16 bytes
_MAX_HEARD_NBYTES: Final = 4096


class UcxThread(ABC):
    """Serves until its socket or its endpoint ends, or `close`. The loop makes, wakes and closes it; it owns the rest.

    Both ends connect: the UCX addresses cross on the socket, then a message of one byte goes each way through UCX, so
    that a port which a firewall closes shows before the plane is chosen, and no transfer pays for connecting.
    """

    def __init__(self, name: str, sock: socket.socket, token: bytes, on_end: Callable[[UcxThread], None]) -> None:
        """Takes `sock` over, on which greeting and welcome have passed. `on_end` is called on the loop when the thread
        ends, whatever the reason."""
        self._loop = asyncio.get_running_loop()
        self._sock, self._token, self._on_end = sock, token, on_end
        self._is_loopback = ipaddress.ip_address(sock.getsockname()[0]).is_loopback
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = False
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.lanes = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            os.close(self._event)
            raise

    @property
    def is_open(self) -> bool:
        return self.opened.done() and not self.opened.cancelled() and self.opened.exception() is None

    def wake(self) -> None:
        """Make the thread look at what it was given. From any thread, before `close` has returned."""
        os.eventfd_write(self._event, 1)

    async def close(self) -> None:
        """End the thread; UCX touches no memory of ours afterwards. Safe to repeat."""
        if self._event < 0:
            return
        self._is_closing = True
        with contextlib.suppress(OSError):  # the other end was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # ends a handshake that waits
        self.wake()
        await self._loop.run_in_executor(None, self._thread.join)
        self._sock.close()
        os.close(self._event)
        self._event = -1

    # --- on the thread ----------------------------------------------------------------------------------------

    @abstractmethod
    def _settle(self, port: Port) -> None:
        """UCX connects the two: the sender, which is ready first, says so on the socket."""

    @abstractmethod
    def _serve(self, port: Port) -> None:
        """Until an exception ends it."""

    @abstractmethod
    def _hear(self, data: bytes) -> None:
        """Bytes came on the socket. Raises `RemoteProtocolError`."""

    def _run(self) -> None:
        port, error = None, PeerLost("closed")
        try:
            self._sock.settimeout(HANDSHAKE_S)
            port = Port(is_loopback=self._is_loopback, watched=(self._sock.fileno(), self._event))
            self._exchange(port)
            port.shut_out_strangers()
            self.lanes = port.lanes
            self._settle(port)
            self._call(end_wait, self.opened, None)
            self._serve(port)
        except (OSError, PeerLost, RemoteProtocolError, EndpointRefused) as exc:
            error = PeerLost(str(exc))
            log.debug("ucx: a connection ended: %s", exc)
        finally:
            self._call(self._end, error)  # wakes the waiters before tearing down, so that they do not wait for that too
            if port is not None:
                port.close()

    def _exchange(self, port: Port) -> None:
        """Addresses, then one message each way. Raises `PeerLost`, `RemoteProtocolError` or `OSError`."""
        self._sock.sendall(pack_address(port.address))
        address = self._read(address_nbytes(self._read(2)))
        self._sock.setblocking(False)
        port.connect(address)
        tag = chunk_tag(transfer_bits(self._token, _HELLO), 0, 0)
        left = {"receive", "send"}
        port.receive(np.zeros(1, dtype=np.uint8), tag, lambda: left.remove("receive"))
        port.send(np.ones(1, dtype=np.uint8), tag, lambda: left.remove("send"))
        until = time.monotonic() + HANDSHAKE_S
        while left:
            if time.monotonic() > until:
                raise PeerLost("ucx: UCX cannot connect where a socket can: is its port closed by a firewall?")
            self._turn(port, HANDSHAKE_S)

    def _turn(self, port: Port, wait_s: float | None = None) -> None:
        """One turn of the port, and what came on the socket meanwhile. Raises `OSError` at the end of either."""
        ready = port.turn(wait_s)
        if self._event in ready:
            os.eventfd_read(self._event)
        if self._is_closing:
            raise ConnectionAbortedError("closed")
        if self._sock.fileno() in ready:
            self._hear(self._read_some())

    def _read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            part = self._sock.recv(nbytes - len(data))
            if not part:
                raise ConnectionResetError("the other end hung up")
            data += part
        return data

    def _read_some(self) -> bytes:
        data = self._sock.recv(_MAX_HEARD_NBYTES)
        if not data:
            raise ConnectionResetError("the other end hung up")
        return data

    def _say(self, data: bytes) -> None:
        """A few bytes: the window bounds what can be unread, so the kernel has room unless the other end cheats."""
        if self._sock.send(data) != len(data):
            raise ConnectionError("the other end does not read")

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended first, as in a process that is being torn down
            self._loop.call_soon_threadsafe(function, *args)

    # --- on the loop ------------------------------------------------------------------------------------------

    def _end(self, error: PeerLost) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # a waiting caller hears of it; none has to
        self._ended(error)
        self._on_end(self)

    @abstractmethod
    def _ended(self, error: PeerLost) -> None:
        """Fail what waits for this thread."""
