"""Where receivers of a plane knock: a listening socket that lets in a peer with its token in time, and how to knock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from disagg.transceiver.planes.greeting import GREETING_S, HANDSHAKE_S, MAX_SILENT, greeting, parse_greeting
from disagg.transceiver.planes.slice_stream import WELCOME, split_address
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.errors import EndpointRefused, PeerLost, PlaneRefused
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import SHORT, shortage

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
"""Connections that wait to be accepted: every decode worker of a router's largest cluster at once after a restart. The
kernel cuts it to its own limit (`net.core.somaxconn`, 4096 by default)."""

ACCEPTS_PER_TURN: Final = 16
"""Taken from the backlog before the loop turns: 0.3 ms, and faster than one process can connect."""

MAX_SILENT_PER_ADDRESS: Final = MAX_SILENT // 2
"""Half of the places, so that no one address takes them all. Not fewer: all workers of a machine come from loopback,
and a fleet behind one NAT from one address. Each is silent for less than a round trip, so that a fleet of hundreds
that starts at once stays below it; if not, those that were dropped knock again."""

REST_S: Final = 1.0
"""Without descriptors nothing can be accepted: as long as asyncio's own servers pause then."""

NUM_KNOCKS: Final = 3
"""A receiver is dropped for others only if they come in greater numbers within its first round trip: seldom twice."""

KNOCK_AGAIN_S: Final = 0.1
"""Pause before the next: above a round trip, and far below what a person notices."""

OnGuest = Callable[[socket.socket, str, bytes], None]
"""Takes over the socket of (incarnation, token), on which `WELCOME` was said."""


@dataclass(slots=True, eq=False)
class _Visitor:
    """A connection that has not shown a token yet. `origin`: the address that it is counted by."""

    sock: socket.socket
    origin: str
    deadline: asyncio.TimerHandle
    said: bytes = field(default=b"")


class Door:
    """Of connections that say nothing the oldest is dropped when places run out: first among those of an address that
    has more than its share, then among all. What has reached this host is read before, so a token that was sent is
    never dropped for strangers.
    """

    def __init__(self, plane: str, tokens: OneTimeTokens, on_guest: OnGuest) -> None:
        self._plane, self._tokens, self._on_guest = plane, tokens, on_guest
        self._visitors: dict[_Visitor, None] = {}
        """The oldest first."""
        self._from: Counter[str] = Counter()
        self._listener: socket.socket | None = None
        self._rest: asyncio.TimerHandle | None = None
        self.num_dropped = 0
        """Connections that were closed before they showed a token."""

    def open(self, host: str, port: int) -> int:
        """Listen (port 0 = any free one); returns the port. Raises `EndpointRefused` or `Shortage`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as exc:
            if exc.errno in SHORT:
                raise shortage(f"data plane {self._plane}", exc) from exc
            raise EndpointRefused(f"{self._plane}: cannot listen at {host}: {exc.strerror or exc}") from exc
        self._listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._listen()
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """Hang up on every peer that was not let in. Safe to repeat."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener)
        if self._rest is not None:
            self._rest.cancel()
        self._listener.close()
        self._listener = None
        for visitor in tuple(self._visitors):
            self._drop(visitor)

    def _listen(self) -> None:
        assert self._listener is not None
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        """Called where a caller waits: no await in which a cancellation could lose the new socket."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # the waiting caller has left
                return
            except OSError as exc:  # descriptors or memory: they wait in the backlog, and the loop must not spin
                self._pause(listener, exc)
                return
            self._receive(sock, _origin(address[0]))

    def _pause(self, listener: socket.socket, short: OSError) -> None:
        log.warning("data plane %s takes no connections for %g s: %s", self._plane, REST_S, short.strerror or short)
        self._loop.remove_reader(listener)
        self._rest = self._loop.call_later(REST_S, self._listen)
        while self._visitors:  # descriptors that are held for nothing
            self._drop_oldest(list(self._visitors))

    def _receive(self, sock: socket.socket, origin: str) -> None:
        sock.setblocking(False)
        deadline = self._loop.call_later(GREETING_S, lambda: self._drop(visitor))
        visitor: _Visitor = _Visitor(sock, origin, deadline)
        self._visitors[visitor] = None
        self._from[origin] += 1
        self._loop.add_reader(sock, self._hear, visitor)
        self._hear(visitor)  # most say their greeting with their first packet
        if self._from[origin] > MAX_SILENT_PER_ADDRESS:
            self._drop_oldest([other for other in self._visitors if other.origin == origin])
        if len(self._visitors) > MAX_SILENT:
            self._drop_oldest(list(self._visitors))

    def _drop_oldest(self, candidates: list[_Visitor]) -> None:
        """Of `candidates` the first that has still said nothing: the kernel may know more than the loop does yet."""
        for visitor in candidates:
            self._hear(visitor)
            if visitor in self._visitors:
                self._drop(visitor)
                return

    def _hear(self, visitor: _Visitor) -> None:
        """Let in a visitor that shows its token; hang up on every other without a word."""
        if visitor not in self._visitors:
            return
        try:
            part = visitor.sock.recv(512)
            visitor.said += part
            shown = parse_greeting(visitor.said) if part else None
        except BlockingIOError:
            return
        except (ValueError, OSError):  # a stranger, or a reader that left
            self._drop(visitor)
            return
        if shown is not None:
            self._let_in(visitor, *shown)
        elif not part:
            self._drop(visitor)

    def _let_in(self, visitor: _Visitor, peer: str, token: bytes) -> None:
        if not self._tokens.redeem(peer, token):
            self._drop(visitor)
            return
        sock = visitor.sock
        self._forget(visitor)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.send(WELCOME)  # one byte, the first: there is room
            self._on_guest(sock, peer, token)
        except (OSError, RuntimeError, MemoryError) as exc:  # it left, or there is no descriptor or thread to serve it
            log.warning("data plane %s cannot serve a decode worker: %s", self._plane, exc)
            sock.close()

    def _drop(self, visitor: _Visitor) -> None:
        self.num_dropped += 1
        self._forget(visitor)
        visitor.sock.close()

    def _forget(self, visitor: _Visitor) -> None:
        """It is let in, or dropped: no visitor any more."""
        del self._visitors[visitor]
        self._from[visitor.origin] -= 1
        if not self._from[visitor.origin]:
            del self._from[visitor.origin]
        visitor.deadline.cancel()
        self._loop.remove_reader(visitor.sock)


def _origin(address: str) -> str:
    """What an address is counted by: of IPv6 the network, of which one host has as many addresses as it likes."""
    if ":" not in address:
        return address
    return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex()


async def knock(me: str, offer: PlaneOffer) -> socket.socket:
    """A socket on which the source has welcomed incarnation `me`. Raises `PlaneRefused`, `PeerLost` or `Shortage`."""
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            for _ in range(NUM_KNOCKS - 1):
                with contextlib.suppress(PlaneRefused, ConnectionResetError, BrokenPipeError):
                    return await _knock(me, offer)
                await asyncio.sleep(KNOCK_AGAIN_S)
            return await _knock(me, offer)
    except TimeoutError as exc:
        raise PeerLost(f"{offer.plane}: {offer.address} did not answer within {HANDSHAKE_S:g} s") from exc
    except (OSError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno in SHORT:
            raise shortage(f"a connection to {offer.address}", exc) from exc
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
