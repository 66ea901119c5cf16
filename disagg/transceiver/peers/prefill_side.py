"""The prefill side's shell: peers that said HELLO, the transfers they fetch, the planes that serve them.

It performs what the cores ask and decides nothing. All methods run on the event loop; `SourceHost` is the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol, cast

from disagg.transceiver.layout.compatibility import Difference, differing_field, geometry_difference
from disagg.transceiver.layout.units import SourceUnit, peer_unit
from disagg.transceiver.memory.foreign_pools import moves_slots
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits
from disagg.transceiver.peers.live import Transfers
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.protocol.actions import (
    Action,
    AskPin,
    AskPrefix,
    ReleaseSource,
    Send,
    SendPayload,
    UnregisterUnits,
)
from disagg.transceiver.protocol.events import CancelAsked, Event, LeaseRenewed, Pinned
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, SourceChanged
from disagg.transceiver.wire.faults import PeerFaults
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.peer import (
    Accepted,
    Cancel,
    Fetch,
    Header,
    Heartbeat,
    Hello,
    PeerMessage,
    Refused,
    TransferMessage,
    Welcome,
)
from disagg.transceiver.wire.messages.values import AttemptKey, Geometry, UnitName
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.timing import DISPATCH_GRACE_S, HEARTBEAT_S, LOST_S
from disagg.transceiver.wire.turns import TurnQueue

log = logging.getLogger(__name__)

MAX_EARLY: Final = 1024
"""FETCHes kept that came before their DISPATCH: as many requests as a router lets wait by default (`--max-queued`). One
beyond it is dropped; its decode worker says it again until it is answered."""


class SourceHost(Protocol):
    """What the sending side needs of its worker, whatever a transfer is for."""

    def release_source(self, key: AttemptKey, reason: str) -> None:
        """The peer needs nothing more of this attempt."""

    def unregister(self, key: AttemptKey, units: Sequence[UnitName]) -> None:
        """These blocks failed verification at the peer and must not be reused."""


class PromptHost(SourceHost, Protocol):
    """And for handoffs."""

    def pin(self, key: AttemptKey) -> None:
        """A FETCH was accepted: the engine must pin this request and answer with the event `Pinned`."""


class LendingHost(SourceHost, Protocol):
    """And for prefixes."""

    def lend(self, key: AttemptKey, asked: AskPrefix) -> None:
        """A FETCH was accepted: the engine must find what is cached of it and answer with the event `Pinned`."""


@dataclass(slots=True)
class _Peer:
    hello: Hello
    routing_id: bytes
    heard_at: float
    cut: SlotUnits | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # payloads of one peer leave in slice order
    packing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send_packed(
        self, plane: SourcePlane, cut: SlotUnits, name: tuple[str, str, int, int], units: Sequence[SourceUnit]
    ) -> None:
        """Send one slice of units that are no slots, packed while the one before it leaves: two are held at most."""
        async with self.packing:
            packed = await asyncio.to_thread(cut.pack, units)
            await self.sending.acquire()  # before the next is packed: they leave in order
        try:
            await plane.send(*name, packed.units, packed.regions)
        finally:
            self.sending.release()


class SendingSide:
    """Serves FETCHes of decode workers from this process's pools."""

    def __init__(
        self,
        node: Node,
        server: ControlServer,
        planes: Mapping[str, SourcePlane],
        host: PromptHost,
        pools: Sequence[PoolRegion] = (),
        faults: PeerFaults | None = None,
        on_refused: Callable[[str, str], None] = lambda purpose, field: None,
    ) -> None:
        """Without `pools`, peers of another geometry are refused.

        `on_refused` hears of each FETCH that asks for what its ticket or its request does not allow: purpose and field.
        """
        self._on_refused = on_refused
        self._faults = faults or PeerFaults()
        self._node = node
        self._pools = pools
        self._server = server
        self._planes = planes
        self._host = host
        self._transfers = Transfers(node.incarnation, self._perform)
        self._peers: dict[str, _Peer] = {}
        self._plane_of: dict[AttemptKey, SourcePlane] = {}
        self._lenders: dict[AttemptKey, LendingHost] = {}
        """Of the transfers that are prefixes."""
        self._unpinned: dict[AttemptKey, None] = {}
        """Accepted and not pinned yet, in the order of their FETCHes."""
        self._early: dict[tuple[str, AttemptKey], tuple[Fetch, float]] = {}
        """By (peer, attempt): no other peer's FETCH takes the place of the one that the router will name."""
        self._closing: dict[str, int] = {}
        """Incarnations whose streams are being closed, each with how many of these tasks run."""
        self._hellos: dict[str, tuple[bytes, Hello]] = {}
        """The last HELLO of each such incarnation, answered when its streams are closed."""
        self._outbox: TurnQueue[tuple[bytes, PeerMessage]] = TurnQueue()
        self._lost: asyncio.Queue[tuple[SourcePlane, str]] = asyncio.Queue()
        for plane in planes.values():
            plane.on_peer_lost = partial(self._note_closed, plane)
        self._payloads: TurnQueue[tuple[AttemptKey, SendPayload]] = TurnQueue()
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._receive())
            tasks.create_task(self._send_queued())
            tasks.create_task(self._send_payloads())
            tasks.create_task(self._beat())
            tasks.create_task(self._lose_closed())
            tasks.create_task(self._transfers.tick())

    # --- the worker's side ------------------------------------------------------------------------------------

    def start(self, key: AttemptKey, transfer: Transfer, host: LendingHost | None = None) -> None:
        """The router dispatched this attempt here, or with a `host` granted this prefix; a FETCH that overtook it is
        served now.
        """
        if host is not None:
            self._lenders[key] = host
        self._transfers.add(key, transfer)
        if early := self._early.pop((transfer.peer, key), None):
            self._accept_plane(key, early[0])
            self._transfers.take(early[0])

    def feed(self, key: AttemptKey, event: Event) -> None:
        if isinstance(event, Pinned):
            self._unpinned.pop(key, None)
        self._transfers.feed(key, event)

    def knows(self, key: AttemptKey) -> bool:
        """Was this attempt dispatched here before, and not forgotten since? A key is used once."""
        return self._transfers.knows(key)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._transfers

    # --- messages ---------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            routing_id, message = await self._server.recv()
            try:
                self._hear(routing_id, message)
            except Exception as error:
                self._faults.blame(self._name_of(routing_id, message), message, error)
                self._lose_route(routing_id, f"its {type(message).__name__} cannot be taken")

    def _hear(self, routing_id: bytes, message: object) -> None:
        match message:
            case Hello():
                self._answer_hello(routing_id, message)
            case Heartbeat():
                self._renew(routing_id, message)
            case Refused(field="stale_peer", destination=dead) if self._is_route_of(routing_id, dead):
                self._lose(dead, "it was replaced by another process")
            case Refused():
                log.warning("a decode worker refused: %.80s", message.field)
            case _ if (header := getattr(message, "header", None)) is not None:
                self._route(routing_id, header, cast(TransferMessage, message))
            case _:
                log.warning("peer sent %s, which no prefill worker takes", type(message).__name__)

    def _name_of(self, routing_id: bytes, message: object) -> str:
        """For people: which peer has this connection."""
        names = [peer.hello.worker_id for peer in self._peers.values() if peer.routing_id == routing_id]
        if not names and isinstance(message, Hello):
            names = [message.worker_id]
        return f"decode worker {names[0]}" if names else f"connection {routing_id.hex()}"

    def _answer_hello(self, routing_id: bytes, hello: Hello) -> None:
        node = self._node
        difference = differing_field(node.identity, hello.identity) or self._geometry_difference(hello.geometry)
        if difference is not None:
            log.warning("refused decode worker %s: %s", hello.worker_id, difference[0])
            self._post(routing_id, Refused(*difference))
            return
        known = self._peers.get(hello.incarnation)
        if known is not None and known.routing_id != routing_id:
            # It gave its last connection up, and with it every transfer on it: their sources need wait for no lease.
            self._lose(hello.incarnation, "it connected anew")
        if hello.incarnation in self._closing:  # tokens minted now would be revoked with the old ones
            self._hellos[hello.incarnation] = routing_id, hello
        else:
            self._welcome(routing_id, hello)

    def _welcome(self, routing_id: bytes, hello: Hello) -> None:
        node, known = self._node, self._peers.get(hello.incarnation)
        if known is None or (known.hello, known.routing_id) != (hello, routing_id):  # else it is said again
            cut = self._cut_for(hello.geometry)
            self._peers[hello.incarnation] = _Peer(hello, routing_id, time.monotonic(), cut)
        named = dict.fromkeys(name for name in hello.planes if name in self._planes)
        offers = tuple(self._planes[name].offer(hello.incarnation) for name in named)
        facts = (node.incarnation, node.worker_id, node.identity, node.geometry)
        self._post(routing_id, Welcome(*facts, offers, node.sends))

    def _geometry_difference(self, theirs: Geometry) -> Difference | None:
        """Units can be cut only from memory that this process can map."""
        ours = self._node.geometry
        if not self._pools:
            return differing_field(ours, theirs)
        return geometry_difference(ours, theirs, joins_ranks=self._node.joins_ranks)

    def _cut_for(self, theirs: Geometry) -> SlotUnits | None:
        """Our slots in units of a peer whose geometry differs."""
        ours = self._node.geometry
        if moves_slots(ours, theirs, self._pools):
            return None
        return SlotUnits(ours, self._pools, peer_unit(ours, theirs.block_size), theirs)

    def _renew(self, routing_id: bytes, beat: Heartbeat) -> None:
        peer = self._known(routing_id, beat.source, beat.destination)
        if peer is None:
            return
        for key in (AttemptKey(*named) for named in beat.transfers):
            if self._transfers.peer_of(key) == beat.source:
                self.feed(key, LeaseRenewed())

    def _route(self, routing_id: bytes, header: Header, message: TransferMessage) -> None:
        if self._known(routing_id, header.source, header.destination) is None:
            return
        key = AttemptKey(header.transfer_id, header.epoch)
        if isinstance(message, Fetch) and not self._transfers.knows(key):
            self._keep_early(key, message)
            return
        if isinstance(message, Fetch):
            self._accept_plane(key, message)
        elif isinstance(message, Cancel):
            self._early.pop((header.source, key), None)  # else DISPATCH would serve what is not wanted any more
        if (answer := self._transfers.take(message)) is not None:
            self._post(routing_id, answer)

    def _keep_early(self, key: AttemptKey, fetch: Fetch) -> None:
        place = fetch.header.source, key
        if place in self._early or len(self._early) < MAX_EARLY:
            self._early.setdefault(place, (fetch, time.monotonic() + DISPATCH_GRACE_S))

    def _known(self, routing_id: bytes, source: str, destination: str) -> _Peer | None:
        """The peer that may say this; a wrong incarnation changes nothing and is told so."""
        peer = self._peers.get(source)
        if destination != self._node.incarnation:
            self._post(routing_id, Refused("stale_peer", self._node.incarnation, destination, destination))
            return None
        if peer is None or peer.routing_id != routing_id:
            self._post(routing_id, Refused("unknown_peer", "HELLO first", source, destination))
            return None
        peer.heard_at = time.monotonic()
        return peer

    def _is_route_of(self, routing_id: bytes, incarnation: str) -> bool:
        peer = self._peers.get(incarnation)
        return peer is not None and peer.routing_id == routing_id

    def _accept_plane(self, key: AttemptKey, fetch: Fetch) -> None:
        # Only while a FETCH can still be admitted: a late repeat would leave an entry that no release takes away. The
        # core refuses a FETCH that names a plane we do not serve.
        if self._transfers.awaits_fetch(key) and fetch.plane in self._planes:
            self._plane_of[key] = self._planes[fetch.plane]

    # --- actions ----------------------------------------------------------------------------------------------

    def _perform(self, key: AttemptKey, action: Action) -> None:
        match action:
            case Send(Accepted() as message):
                self._send(key, replace(message, queue_position=self._position(key)))
            case Send(message):
                if isinstance(message, Refused):
                    self._on_refused(self._transfers.purpose_of(key), message.field)
                self._send(key, message)
            case SendPayload():
                self._payloads.put_nowait((key, action))
            case AskPin():
                self._unpinned[key] = None
                self._host.pin(key)
            case AskPrefix():
                self._lenders[key].lend(key, action)
            case ReleaseSource(reason):
                self._plane_of.pop(key, None)
                self._unpinned.pop(key, None)
                (self._lenders.pop(key, None) or self._host).release_source(key, reason)
            case UnregisterUnits(units):
                peer = self._peers.get(self._transfers.peer_of(key))
                host = self._lenders.get(key) or self._host
                host.unregister(key, peer.cut.blocks(units) if peer is not None and peer.cut else units)
            case _:
                raise AssertionError(f"a sender asked for {action}")

    def _position(self, key: AttemptKey) -> int:
        """How many accepted transfers wait for their pins ahead of this one; 0 once it is pinned."""
        return list(self._unpinned).index(key) if key in self._unpinned else 0

    def _send(self, key: AttemptKey, message: TransferMessage | Refused) -> None:
        """To the transfer's own peer; a peer that is lost counts as told."""
        peer = self._peers.get(self._transfers.peer_of(key))
        if peer is not None:
            self._post(peer.routing_id, message)

    def _post(self, routing_id: bytes, message: PeerMessage) -> None:
        self._outbox.put_nowait((routing_id, message))

    async def _send_queued(self) -> None:
        while True:
            routing_id, message = await self._outbox.get()
            try:
                await self._server.send(routing_id, message)
            except PeerLost as loss:
                self._lose_route(routing_id, str(loss))
            except LocalProtocolError as fault:
                self._fail_unsendable(message, str(fault))

    def _fail_unsendable(self, message: PeerMessage, fault: str) -> None:
        """What no frame can carry ends its own transfer, if it belongs to one, and nothing else."""
        log.error("cannot send a %s: %s", type(message).__name__, fault)
        header = getattr(message, "header", None)
        if header is None:
            return
        key = AttemptKey(header.transfer_id, header.epoch)
        if self._transfers.peer_of(key) == header.destination:
            self.feed(key, CancelAsked(f"a message cannot be sent: {fault}"))

    async def _send_payloads(self) -> None:
        while True:
            self._tasks.create_task(self._send_payload(*await self._payloads.get()))

    async def _send_payload(self, key: AttemptKey, action: SendPayload) -> None:
        plane, peer = self._plane_of.get(key), self._peers.get(self._transfers.peer_of(key))
        if plane is None or peer is None:
            return
        slice_name = peer.hello.incarnation, key.transfer_id, key.epoch, action.number
        try:
            if peer.cut is not None:
                await peer.send_packed(plane, peer.cut, slice_name, action.units)
            else:
                async with contextlib.nullcontext() if plane.queues_slices else peer.sending:
                    await plane.send(*slice_name, action.units)
        except SourceChanged as changed:  # a bug or a hostile writer: this attempt ends, the request may be retried
            self.feed(key, CancelAsked(str(changed)))
        except PeerLost as loss:
            if self._is_route_of(peer.routing_id, peer.hello.incarnation):  # else it has connected anew meanwhile
                self._lose(peer.hello.incarnation, str(loss))
        except Exception as exc:  # no memory or thread for this slice, or a fault of ours: this attempt ends, no other
            log.error("slice %d of %s cannot be sent", action.number, key.transfer_id, exc_info=exc)
            self.feed(key, CancelAsked(f"a slice cannot be sent: {type(exc).__name__}"))

    # --- liveness ---------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now = time.monotonic()
            for incarnation, peer in list(self._peers.items()):
                if now - peer.heard_at > LOST_S:
                    self._lose(incarnation, f"silent for {LOST_S:g} s")
                else:
                    self._post(peer.routing_id, Heartbeat(self._node.incarnation, incarnation, ()))
            for fetch in [fetch for fetch, until in self._early.values() if until <= now]:
                self._refuse_early(fetch)

    def _refuse_early(self, fetch: Fetch) -> None:
        """The router never dispatched what this FETCH asks for."""
        source = fetch.header.source
        del self._early[source, AttemptKey(fetch.header.transfer_id, fetch.header.epoch)]
        peer, answer = self._peers.get(source), self._transfers.take(fetch)
        if peer is not None and answer is not None:
            self._post(peer.routing_id, answer)

    def _note_closed(self, plane: SourcePlane, incarnation: str) -> None:
        self._lost.put_nowait((plane, incarnation))

    async def _lose_closed(self) -> None:
        """The end of the data connection that its transfers use is the first news of a peer's death.

        One that no transfer uses may be of a plane that the peer gave up for the next it prefers.
        """
        while True:
            plane, incarnation = await self._lost.get()
            if any(self._plane_of.get(key) is plane for key in self._transfers.of_peer(incarnation)):
                self._lose(incarnation, "its data connection closed")
            else:
                self._close_streams(incarnation, (plane,))

    def _lose_route(self, routing_id: bytes, reason: str) -> None:
        for incarnation, peer in list(self._peers.items()):
            if peer.routing_id == routing_id:
                self._lose(incarnation, reason)

    def _lose(self, incarnation: str, reason: str) -> None:
        """Forget a dead incarnation: it counts as acknowledged, so its sources are freed at once."""
        peer = self._peers.pop(incarnation, None)
        if peer is None:
            return
        log.info("lost decode worker %s: %s", peer.hello.worker_id, reason)
        for place in [place for place in self._early if place[0] == incarnation]:
            del self._early[place]
        for key in self._transfers.of_peer(incarnation):
            self._transfers.tell_gone(key, reason)
        self._close_streams(incarnation, self._planes.values())

    def _close_streams(self, incarnation: str, planes: Iterable[SourcePlane]) -> None:
        """In a task of its own: what closes slowly delays the next HELLO of its own incarnation only."""
        self._closing[incarnation] = self._closing.get(incarnation, 0) + 1
        self._tasks.create_task(self._drop(incarnation, tuple(planes)))

    async def _drop(self, incarnation: str, planes: Sequence[SourcePlane]) -> None:
        dropped = await asyncio.gather(*(plane.drop(incarnation) for plane in planes), return_exceptions=True)
        for fault in (end for end in dropped if isinstance(end, Exception)):
            log.error("a data plane cannot drop decode worker %s", incarnation, exc_info=fault)
        self._closing[incarnation] -= 1
        if not self._closing[incarnation]:
            del self._closing[incarnation]
            if hello := self._hellos.pop(incarnation, None):
                self._welcome(*hello)
