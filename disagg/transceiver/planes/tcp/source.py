"""The sender's end of the tcp plane: plain sockets, straight out of the pools, for peers on another host.

`sendmsg` over the slots themselves: the kernel copies them once, into its own buffers, and no byte of payload passes
through Python or through memory of ours. Each receiver has one connection and one thread that sends on it, so a slow
receiver delays no other and the event loop never copies.

Nothing is encrypted: a reader of the network between the hosts can read KV. The token keeps strangers from being
served, the manifest's MAC and digests keep forged bytes from being decoded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Sequence
from typing import Any

from disagg.transceiver.layout.runs import ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.copying import check_generations
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.door import Door
from disagg.transceiver.planes.probe import send_probe
from disagg.transceiver.planes.slice_stream import SliceHeader, run_views, wire_name
from disagg.transceiver.planes.tcp.stream import Stream
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.errors import PeerLost
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import bracketed, check_endpoint

log = logging.getLogger(__name__)


class TcpSourcePlane(SourcePlane):
    name = "tcp"
    sends_bytes = True
    queues_slices = True

    def __init__(self, host: str, keys: ClusterKeys, *, port: int = 0, advertised_host: str = "") -> None:
        """Listen on `host` (port 0 = any free one); peers are told `advertised_host` where that differs."""
        self._host, self._port, self._advertised_host = host, port, advertised_host or host
        self._keys = keys
        self._tokens = OneTimeTokens()
        self._door = Door(self.name, self._tokens, self._admit)
        self._pools: tuple[PoolRegion, ...] = ()
        self._streams: dict[str, Stream] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._address = ""

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `EndpointRefused`."""
        self._pools = tuple(pools)
        check_endpoint(f"tcp://{bracketed(self._host)}:{self._port}", self._keys)
        port = self._door.open(self._host, self._port)
        self._address = f"tcp://{bracketed(self._advertised_host)}:{port}"
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
        await self._door.close()
        for probe in tuple(self._probes):
            probe.cancel()
        for peer in tuple(self._streams):
            await self.drop(peer)
        await asyncio.gather(*self._probes, *self._closings, return_exceptions=True)

    # --- receivers --------------------------------------------------------------------------------------------

    def _admit(self, sock: socket.socket, peer: str, token: bytes) -> None:
        """`peer` has shown its token."""
        previous = self._streams.pop(peer, None)
        if previous is not None:
            _spawn(previous.close(), self._closings)
        self._streams[peer] = Stream(
            sock,
            lambda stream: self._lose(peer, stream),
            lambda: _spawn(send_probe(self, peer, self._pools), self._probes),
        )

    def _lose(self, peer: str, stream: Stream) -> None:
        """The receiver hung up. It is dropped by the first that hears of it."""
        if self._streams.get(peer) is stream and self.on_peer_lost is not None:
            self.on_peer_lost(peer)


def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work, name="tcp plane")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
