"""The sender's end of the ucx plane: packed chunks through UCX, over whatever UCX finds between the two.

RDMA, cuda_ipc, process_vm_readv on one host, or TCP. Next to each pair of endpoints lies an ordinary socket: a peer
that shows its token there is served, and its end is the peer's death. Each receiver has one thread, which gathers and
sends.

Nothing is encrypted: a reader of the network between the hosts can read KV. A process that reaches UCX's own ports can
speak to UCX, whose protocol knows no strangers, but gets no KV: that is sent to endpoints of peers that showed a token.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from disagg.transceiver.layout.runs import ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.copying import check_generations
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.door import Door
from disagg.transceiver.planes.probe import send_probe
from disagg.transceiver.planes.slice_stream import SliceHeader, run_views, wire_name
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.planes.ucx.library import library
from disagg.transceiver.planes.ucx.sender import UcxSender
from disagg.transceiver.planes.ucx.thread import UcxThread
from disagg.transceiver.wire.errors import PeerLost
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import bracketed, check_endpoint

log = logging.getLogger(__name__)


class UcxSourcePlane(SourcePlane):
    name = "ucx"
    sends_bytes = True
    queues_slices = True

    def __init__(self, host: str, keys: ClusterKeys, *, port: int = 0, advertised_host: str = "") -> None:
        """Listen on `host` (port 0 = any free one); peers are told `advertised_host` where that differs."""
        self._host, self._port, self._advertised_host = host, port, advertised_host or host
        self._keys = keys
        self._tokens = OneTimeTokens()
        self._door = Door(self.name, self._tokens, self._admit)
        self._pools: tuple[PoolRegion, ...] = ()
        self._senders: dict[str, UcxSender] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._address = ""

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `EndpointRefused`, also where ucxx is missing."""
        self._pools = tuple(pools)
        check_endpoint(f"tcp://{bracketed(self._host)}:{self._port}", self._keys)
        await asyncio.to_thread(library)
        port = self._door.open(self._host, self._port)
        self._address = f"tcp://{bracketed(self._advertised_host)}:{port}"
        log.info("data plane ucx listens at %s: KV that leaves there is not encrypted", self._address)

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
        """Send one slice; returns when all of it is gathered. Waits while the receiver holds a full window.

        Raises `PeerLost`, or `SourceChanged` when a slot was given away before its bytes were copied (nothing was sent)
        or meanwhile (the digest of the destination will say so too).
        """
        sender = self._senders.get(peer)
        if sender is None:
            raise PeerLost(f"decode worker {peer} has not opened the ucx plane")
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        planned = ints([u.generation for u in units])
        check = functools.partial(check_generations, regions or self._pools, pools, slots, planned)
        views = [np.frombuffer(view, dtype=np.uint8) for view in run_views(regions or self._pools, pools, slots)]
        header = SliceHeader(wire_name(transfer_id, epoch), number, sum(map(len, views)))
        await sender.send(header, views, check)

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        sender = self._senders.pop(peer, None)
        if sender is not None:
            await sender.close()

    async def close(self) -> None:
        await self._door.close()
        for peer in tuple(self._senders):
            await self.drop(peer)
        for probe in tuple(self._probes):
            probe.cancel()
        await asyncio.gather(*self._probes, *self._closings, return_exceptions=True)

    # --- receivers --------------------------------------------------------------------------------------------

    def _admit(self, sock: socket.socket, peer: str, token: bytes) -> None:
        """`peer` has shown its token."""
        previous = self._senders.pop(peer, None)
        if previous is not None:
            _spawn(previous.close(), self._closings)
        self._senders[peer] = UcxSender(
            sock,
            token,
            lambda sender: self._lose(peer, sender),
            lambda: _spawn(send_probe(self, peer, self._pools), self._probes),
        )

    def _lose(self, peer: str, sender: UcxThread) -> None:
        """The receiver hung up: it is dropped by the first that hears of it. One that never got as far is forgotten
        here: it goes on to its next plane."""
        if self._senders.get(peer) is not sender:
            return
        if not sender.is_open:
            del self._senders[peer]
            _spawn(sender.close(), self._closings)
        elif self.on_peer_lost is not None:
            self.on_peer_lost(peer)


def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work, name="ucx plane")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
