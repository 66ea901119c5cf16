"""Shared memory on one host: the reader maps the owner's pools read-only and copies slots for itself.

One memcpy per byte and no system call per slot. Nothing has a name on disk: pools are memfds, the socket that passes
them lives in the abstract namespace, and the kernel frees both with their last holder. A peer that may map a pool
can read all of it: the boundary is the one-time token, which needs the cluster's secret, and the user id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Sequence

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.greeting import GREETING_S, HANDSHAKE_S, MAX_SILENT, parse_greeting
from disagg.transceiver.planes.reading import ReadingLandingPlane, ReadSourcePlane
from disagg.transceiver.planes.shm.handshake import check_shareable, peer_uid, request_pools, send_pools
from disagg.transceiver.planes.shm.mapping import PoolMapping
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused, Shortage
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import SHORT


def _abstract(address: str) -> str:
    return f"\0disagg-{address}"  # a leading zero byte: the kernel's own namespace, not the file system's


class ShmSourcePlane(ReadSourcePlane):
    name = "shm"

    def __init__(self) -> None:
        self._address = secrets.token_hex(16)
        self._nonce = secrets.token_bytes(16)
        self._tokens = OneTimeTokens()
        self._pools: tuple[PoolRegion, ...] = ()
        self._server: asyncio.Server | None = None
        self._doors: set[_Door] = set()
        self._silent: dict[_Door, None] = {}
        """Those that have not shown a token yet, the oldest first."""
        self._door_of: dict[str, _Door] = {}

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `PlaneRefused` when a pool's memory cannot be shared."""
        for pool in pools:
            check_shareable(pool)
        self._pools = tuple(pools)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Door(self), _abstract(self._address))

    def offer(self, peer: str) -> PlaneOffer:
        return PlaneOffer(self.name, self._address, self._tokens.mint(peer), self._nonce)

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        door = self._door_of.pop(peer, None)
        if door is not None:
            await door.shut()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for door in tuple(self._doors):
            await door.shut()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    # --- called by doors -------------------------------------------------------------------------------------

    def opened(self, door: _Door) -> None:
        """Of those that say nothing the oldest leaves when there are too many. All are of our own user."""
        self._doors.add(door)
        self._silent[door] = None
        if len(self._silent) > MAX_SILENT:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            oldest.abort()

    def greeted(self, door: _Door, peer: str, token: bytes, sock: socket.socket) -> bool:
        """Hand the pools to `peer` if its token is good."""
        if not self._tokens.redeem(peer, token):
            return False
        self._silent.pop(door, None)
        previous, self._door_of[peer] = self._door_of.get(peer), door
        if previous is not None:
            previous.abort()
        send_pools(sock, self._nonce, self._pools)
        return True

    def shut(self, door: _Door, peer: str) -> None:
        self._doors.discard(door)
        self._silent.pop(door, None)
        if self._door_of.get(peer) is door:  # neither dropped nor replaced: the peer itself left
            del self._door_of[peer]
            if self.on_peer_lost is not None:
                self.on_peer_lost(peer)


class _Door(asyncio.Protocol):
    """One reader's connection. After the handshake it carries nothing: its end is the news of the reader's death."""

    def __init__(self, plane: ShmSourcePlane) -> None:
        self._plane = plane
        self._data = b""
        self._peer = ""
        loop = asyncio.get_running_loop()
        self._closed = loop.create_future()
        self._deadline = loop.call_later(GREETING_S, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if peer_uid(transport.get_extra_info("socket")) != os.geteuid():
            self.abort()
        else:
            self._plane.opened(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            greeting = parse_greeting(self._data)
        except ValueError:  # not a reader, or one that talks after the handshake
            self.abort()
            return
        if greeting is not None:
            self._admit(*greeting)

    def _admit(self, peer: str, token: bytes) -> None:
        self._deadline.cancel()
        self._peer = peer
        try:
            with self._transport.get_extra_info("socket").dup() as sock:
                if not self._plane.greeted(self, peer, token, sock):
                    self.abort()
        except OSError:  # the reader left during its own handshake
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._plane.shut(self, self._peer)
        self._closed.set_result(None)

    def abort(self) -> None:
        self._transport.abort()

    async def shut(self) -> None:
        """Close, and wait until the socket is."""
        self.abort()
        await self._closed


class ShmLandingPlane(ReadingLandingPlane):
    name = "shm"

    def __init__(self) -> None:
        super().__init__()
        self._mappings: list[PoolMapping] = []
        self._socket: socket.socket | None = None

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        """Map the source's pools and fault their pages in, in a thread: for large pools this takes a while."""
        assert self._socket is None, "a landing plane connects once"
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(None, self._open_blocking, me, offer)
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(PlaneRefused, PeerLost, Shortage):
                await asyncio.shield(opening)  # bounded by HANDSHAKE_S and the mapping; then all of it can be released
            await self.close()
            raise
        try:
            self._open([mapping.region for mapping in self._mappings], pools)
        except PlaneRefused:
            await self.close()
            raise
        assert self._socket is not None
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._hear)

    def _open_blocking(self, me: str, offer: PlaneOffer) -> None:
        fds: list[int] = []
        sock: socket.socket | None = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(HANDSHAKE_S)
            sock.connect(_abstract(offer.address))
            received = request_pools(sock, me, offer.token, offer.nonce)
            fds = [fd for fd, _ in received]
            for fd, shape in received:
                self._mappings.append(PoolMapping(fd, shape))
        except BaseException as exc:
            if sock is not None:
                sock.close()
            self._unmap()
            if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno in SHORT):
                raise Shortage(f"shm: no descriptor or memory for the source's pools: {exc}") from exc
            if isinstance(exc, OSError):
                raise PlaneRefused(f"shm: cannot reach the source from this host: {exc.strerror or exc}") from exc
            raise
        finally:
            for fd in fds:  # a mapping holds the memory by itself
                os.close(fd)
        self._socket = sock

    def _hear(self) -> None:
        """The source has nothing to say after the handshake: readable means that it ended."""
        assert self._socket is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        self._lose()

    async def close(self) -> None:
        self._is_lost = True
        self._sources, self._pools = (), ()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._mappings:
            await asyncio.get_running_loop().run_in_executor(None, self._unmap)

    def _unmap(self) -> None:
        while self._mappings:
            self._mappings.pop().close()
