"""Where receivers of a plane knock: a listening socket that lets in who shows its token in time, and how to knock."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from disagg.transceiver.errors import EndpointRefused, PeerLost, PlaneRefused
from disagg.transceiver.messages.values import PlaneOffer
from disagg.transceiver.planes.greeting import HANDSHAKE_S, greeting, parse_greeting
from disagg.transceiver.planes.tcp_wire import WELCOME, split_address
from disagg.transceiver.planes.tokens import Tokens

BACKLOG: Final = 128
"""Connections that wait to be accepted: every decode worker of a large cluster at once after a restart."""

MAX_GREETINGS: Final = 128
"""Connections that have not shown a token yet. Beyond it new ones are closed: strangers cannot exhaust descriptors."""

OnGuest = Callable[[socket.socket, str, bytes], None]
"""Takes over the socket of (incarnation, token), on which `WELCOME` was said."""


class Door:
    def __init__(self, plane: str, tokens: Tokens, on_guest: OnGuest) -> None:
        self._plane, self._tokens, self._on_guest = plane, tokens, on_guest
        self._greetings: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def open(self, host: str, port: int) -> int:
        """Listen (port 0 = any free one); returns the port. Raises `EndpointRefused`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as exc:
            raise EndpointRefused(f"{self._plane}: cannot listen at {host}: {exc.strerror or exc}") from exc
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name=f"{self._plane} door")
        return int(listener.getsockname()[1])

    async def close(self) -> None:
        """Safe to repeat."""
        if self._listener is None:
            return
        tasks = {self._accepting, *self._greetings}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listener.close()
        self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if len(self._greetings) >= MAX_GREETINGS:
                sock.close()
                continue
            task = asyncio.create_task(self._greet(sock), name=f"{self._plane} greeting")
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

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
            return
        except BaseException:
            sock.close()
            raise
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
