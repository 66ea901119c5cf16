"""Where receivers of a plane knock: a listening socket that lets in who shows its token in time, and how to knock."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Final

from disagg.transceiver.planes.greeting import HANDSHAKE_S, greeting, parse_greeting
from disagg.transceiver.planes.slice_stream import WELCOME, split_address
from disagg.transceiver.planes.tokens import Tokens
from disagg.transceiver.wire.errors import EndpointRefused, PeerLost, PlaneRefused
from disagg.transceiver.wire.messages.values import PlaneOffer

log = logging.getLogger(__name__)

BACKLOG: Final = 128
"""Connections that wait to be accepted: every decode worker of a large cluster at once after a restart."""

MAX_GREETINGS: Final = 128
"""Connections that have not shown a token yet. Beyond it new ones are closed: strangers cannot exhaust descriptors."""

REST_S: Final = 1.0
"""Without descriptors nothing can be accepted: as long as asyncio's own servers pause then."""

OnGuest = Callable[[socket.socket, str, bytes], None]
"""Takes over the socket of (incarnation, token), on which `WELCOME` was said."""


class Door:
    def __init__(self, plane: str, tokens: Tokens, on_guest: OnGuest) -> None:
        self._plane, self._tokens, self._on_guest = plane, tokens, on_guest
        self._greetings: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._rest: asyncio.TimerHandle | None = None

    def open(self, host: str, port: int) -> int:
        """Listen (port 0 = any free one); returns the port. Raises `EndpointRefused`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as exc:
            raise EndpointRefused(f"{self._plane}: cannot listen at {host}: {exc.strerror or exc}") from exc
        self._listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._listen()
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """Hang up on everybody who was not let in. Safe to repeat."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        if self._rest is not None:
            self._rest.cancel()
        self._listener.close()
        self._listener = None
        for task in self._greetings:
            task.cancel()
        if self._greetings:
            await asyncio.wait(self._greetings)

    def _listen(self) -> None:
        assert self._listener is not None
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        """Called where somebody waits: no await in which a cancellation could lose the new socket."""
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # who waited has left
            return
        except OSError as exc:  # descriptors or memory: they wait in the backlog, and the loop must not spin meanwhile
            log.warning("data plane %s takes no connections for %g s: %s", self._plane, REST_S, exc.strerror or exc)
            self._loop.remove_reader(listener)
            self._rest = self._loop.call_later(REST_S, self._listen)
            return
        sock.setblocking(False)
        if len(self._greetings) >= MAX_GREETINGS:
            sock.close()
            return
        task = self._loop.create_task(self._greet(sock), name=f"{self._plane} greeting")
        self._greetings.add(task)
        task.add_done_callback(partial(self._end_greeting, sock))

    def _end_greeting(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._greetings.discard(task)
        if task.cancelled():  # perhaps before its first line ran
            sock.close()

    async def _greet(self, sock: socket.socket) -> None:
        """Hand on who shows its token in time; hang up on everybody else without a word."""
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                peer, token = await _read_greeting(sock)
            if not self._tokens.redeem(peer, token):
                raise ValueError("not the token offered to this peer")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_sendall(sock, WELCOME)
        except (ValueError, OSError):  # a stranger, or a reader that left; TimeoutError is an OSError
            sock.close()
        else:
            self._on_guest(sock, peer, token)


async def _read_greeting(sock: socket.socket) -> tuple[str, bytes]:
    """(incarnation, token). Raises `ValueError`."""
    data = b""
    while True:
        part = await asyncio.get_running_loop().sock_recv(sock, 512)
        if not part:
            raise ValueError("hung up")
        data += part
        greeting = parse_greeting(data)
        if greeting is not None:
            return greeting


async def knock(me: str, offer: PlaneOffer) -> socket.socket:
    """A socket on which the source has welcomed incarnation `me`. Raises `PlaneRefused` or `PeerLost`."""
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            return await _knock(me, offer)
    except TimeoutError as exc:
        raise PeerLost(f"{offer.plane}: {offer.address} did not answer within {HANDSHAKE_S:g} s") from exc
    except (OSError, ValueError) as exc:
        raise PlaneRefused(f"{offer.plane}: cannot connect to {offer.address}: {exc}") from exc


async def _knock(me: str, offer: PlaneOffer) -> socket.socket:
    host, port = split_address(offer.address)
    loop = asyncio.get_running_loop()
    family, kind, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, address)
        await loop.sock_sendall(sock, greeting(me, offer.token))
        if await loop.sock_recv(sock, len(WELCOME)) != WELCOME:
            raise PlaneRefused(f"{offer.plane}: the token is not the one offered to this peer, or was used before")
    except BaseException:
        sock.close()
        raise
    return sock
