"""Source planes that listen at a TCP port behind a `Door` and serve each receiver from a thread: tcp and ucx."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from disagg.transceiver.layout.runs import ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.copying import check_generations
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.door import Door
from disagg.transceiver.planes.probe import send_probe
from disagg.transceiver.planes.slice_stream import SliceHeader, run_views, wire_name
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.errors import PeerLost
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import bracketed, check_endpoint

log = logging.getLogger(__name__)


class SliceSender(Protocol):
    """What sends slices to one receiver, from a thread of its own."""

    async def send(self, header: SliceHeader, views: list[memoryview], check: Callable[[], None]) -> None:
        """Send one slice. `check` raises `SourceChanged`; it runs before the first byte is copied and after the last.

        Raises `PeerLost`.
        """

    async def close(self) -> None: ...


Sender = TypeVar("Sender", bound=SliceSender)


class ListeningSourcePlane(SourcePlane, Generic[Sender]):
    sends_bytes = True
    queues_slices = True

    def __init__(self, host: str, keys: ClusterKeys, *, port: int = 0, advertised_host: str = "") -> None:
        """Listen on `host` (port 0 = any free one); peers are told `advertised_host` where that differs."""
        self._host, self._port, self._advertised_host = host, port, advertised_host or host
        self._keys = keys
        self._tokens = OneTimeTokens()
        self._door = Door(self.name, self._tokens, self._admit)
        self._pools: tuple[PoolRegion, ...] = ()
        self._senders: dict[str, Sender] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._address = ""

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `EndpointRefused`."""
        self._pools = tuple(pools)
        check_endpoint(f"tcp://{bracketed(self._host)}:{self._port}", self._keys)
        port = self._door.open(self._host, self._port)
        self._address = f"tcp://{bracketed(self._advertised_host)}:{port}"
        log.info("data plane %s listens at %s: KV that leaves there is not encrypted", self.name, self._address)

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
        """Send one slice; returns when the sender has taken all of it. Waits while the receiver does not read.

        Raises `PeerLost`, or `SourceChanged` when a slot was given away before its bytes were copied (nothing was sent)
        or meanwhile (the digest of the destination will say so too).
        """
        sender = self._senders.get(peer)
        if sender is None:
            raise PeerLost(f"decode worker {peer} has not opened the {self.name} plane")
        regions = regions or self._pools
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        planned = ints([u.generation for u in units])
        check = functools.partial(check_generations, regions, pools, slots, planned)
        views = run_views(regions, pools, slots)
        header = SliceHeader(wire_name(transfer_id, epoch), number, sum(map(len, views)))
        await sender.send(header, views, check)

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        sender = self._senders.pop(peer, None)
        if sender is not None:
            await sender.close()

    async def close(self) -> None:
        await self._door.close()
        for probe in tuple(self._probes):
            probe.cancel()
        for peer in tuple(self._senders):
            await self.drop(peer)
        await asyncio.gather(*self._probes, *self._closings, return_exceptions=True)

    # --- receivers --------------------------------------------------------------------------------------------

    @abstractmethod
    def _make_sender(self, sock: socket.socket, peer: str, token: bytes) -> Sender:
        """What serves `peer` over `sock`, which has shown its token."""

    def _admit(self, sock: socket.socket, peer: str, token: bytes) -> None:
        """`peer` has shown its token."""
        previous = self._senders.pop(peer, None)
        if previous is not None:
            self._spawn(previous.close(), self._closings)
        self._senders[peer] = self._make_sender(sock, peer, token)

    def _probe(self, peer: str) -> None:
        """`peer` asked for the slices of `probe.measure`."""
        self._spawn(send_probe(self, peer, self._pools), self._probes)

    def _lose(self, peer: str, sender: object) -> None:
        """The receiver hung up. It is dropped by the first that hears of it."""
        if self._senders.get(peer) is sender and self.on_peer_lost is not None:
            self.on_peer_lost(peer)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work, name=f"{self.name} plane")
        tasks.add(task)
        task.add_done_callback(tasks.discard)
