"""The sender's end of the tcp plane: plain sockets, straight out of the pools, for peers on another host.

`sendmsg` over the slots themselves: the kernel copies them once, into its own buffers, and no byte of payload passes
through Python or through memory of ours. Each receiver has one connection and one thread that sends on it, so a slow
receiver delays nobody else and the event loop never copies.

Nothing is encrypted: who can read the network between the hosts can read KV. The token keeps strangers from being
served, the manifest's MAC and digests keep forged bytes from being decoded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from disagg.transceiver.errors import EndpointRefused, PeerLost
from disagg.transceiver.keys import ClusterKeys
from disagg.transceiver.messages.values import PlaneOffer
from disagg.transceiver.planes.base import PoolRegion, SourcePlane, SourceUnit
from disagg.transceiver.planes.copying import check_generations, ints
from disagg.transceiver.planes.greeting import HANDSHAKE_S, parse_greeting
from disagg.transceiver.planes.probe import send_probe
from disagg.transceiver.planes.tcp_stream import Stream
from disagg.transceiver.planes.tcp_wire import WELCOME, SliceHeader, run_views, wire_name
from disagg.transceiver.planes.tokens import Tokens
from disagg.transceiver.sockets import bracketed, check_endpoint

log = logging.getLogger(__name__)

BACKLOG: Final = 128
"""Connections that wait to be accepted: every decode worker of a large cluster at once after a restart."""

MAX_GREETINGS: Final = 128
"""Connections that have not shown a token yet, or are being measured. Beyond it new ones are closed: strangers cannot
exhaust descriptors."""


class TcpSourcePlane(SourcePlane):
    name = "tcp"
    sends_bytes = True
    queues_slices = True

    def __init__(self, host: str, keys: ClusterKeys, *, port: int = 0, advertised_host: str = "") -> None:
        """Listen on `host` (port 0 = any free one); peers are told `advertised_host` where that differs."""
        self._host, self._port, self._advertised_host = host, port, advertised_host or host
        self._keys = keys
        self._tokens = Tokens()
        self._pools: tuple[PoolRegion, ...] = ()
        self._streams: dict[str, Stream] = {}
        self._greetings: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._address = ""

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `EndpointRefused`."""
        self._pools = tuple(pools)
        check_endpoint(f"tcp://{bracketed(self._host)}:{self._port}", self._keys)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server((self._host, self._port), family=family, backlog=BACKLOG)
        except OSError as exc:
            raise EndpointRefused(f"tcp: cannot listen at {self._host}: {exc.strerror or exc}") from exc
        self._listener.setblocking(False)
        self._address = f"tcp://{bracketed(self._advertised_host)}:{self._listener.getsockname()[1]}"
        self._accepting = asyncio.create_task(self._accept(self._listener), name="tcp plane")
        log.info("data plane tcp listens at %s: KV that leaves there is not encrypted", self._address)

    def offer(self, peer: str) -> PlaneOffer:
        return PlaneOffer(self.name, self._address, self._tokens.mint(peer))

    async def send(
        self,
        peer: str,
        transfer_id: str,
        epoch: int,
        number: int,
        units: Sequence[SourceUnit],
        regions: Sequence[PoolRegion] | None = None,
    ) -> None:
        """Send one slice; returns when the kernel has it. Waits while the receiver does not read.

        Raises `PeerLost`, or `SourceChanged` when a slot was given away before its bytes were copied (nothing was sent)
        or meanwhile (the digest of the destination will say so too).
        """
        stream = self._streams.get(peer)
        if stream is None:
            raise PeerLost(f"decode worker {peer} has not opened the tcp plane")
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        planned = ints([u.generation for u in units])

        def check() -> None:
            check_generations(regions or self._pools, pools, slots, planned)

        views = run_views(regions or self._pools, pools, slots)
        header = SliceHeader(wire_name(transfer_id, epoch), number, sum(map(len, views)))
        await stream.send(header.pack(), views, check)

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        stream = self._streams.pop(peer, None)
        if stream is not None:
            await stream.close()

    async def close(self) -> None:
        if self._listener is None:
            return
        tasks = {self._accepting, *self._greetings}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listener.close()
        self._listener = None
        for peer in tuple(self._streams):
            await self.drop(peer)

    # --- receivers --------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if len(self._greetings) >= MAX_GREETINGS:
                sock.close()
                continue
            self._spawn(self._greet(sock))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="tcp greeting")
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """Serve who shows its token in time; hang up on everybody else without a word."""
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
        previous = self._streams.pop(peer, None)
        self._streams[peer] = Stream(
            sock, lambda stream: self._lose(peer, stream), lambda: self._spawn(send_probe(self, peer, self._pools))
        )
        if previous is not None:
            await previous.close()

    def _lose(self, peer: str, stream: Stream) -> None:
        """The receiver hung up. It is dropped by whoever hears of it."""
        if self._streams.get(peer) is stream and self.on_peer_lost is not None:
            self.on_peer_lost(peer)


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
