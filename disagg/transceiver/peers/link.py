"""A sink's link to one incarnation of a source: HELLO until answered, heartbeats, a plane opened, loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from disagg.transceiver.layout.compatibility import differing_field, geometry_difference
from disagg.transceiver.memory.foreign_pools import moves_slots
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.link_meter import LinkMeter
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.probe import measure
from disagg.transceiver.planes.reshaping import ReshapingPlane
from disagg.transceiver.wire.errors import (
    LocalProtocolError,
    PeerLost,
    PlaneRefused,
    ProtocolDiffers,
    RemoteProtocolError,
    Shortage,
    TransceiverError,
    clipped,
    first_cause,
)
from disagg.transceiver.wire.faults import PeerFaults
from disagg.transceiver.wire.links import PROTOCOL_FIELD, ControlClient
from disagg.transceiver.wire.messages.peer import (
    Header,
    Heartbeat,
    Hello,
    PeerMessage,
    Refused,
    TransferMessage,
    Welcome,
)
from disagg.transceiver.wire.messages.ranges import MAX_NAMED_TRANSFERS
from disagg.transceiver.wire.messages.router import LinkStatus as LinkReport
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import AttemptKey, Geometry, PlaneOffer
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.purposes import shared
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S, SUSPECT_S
from disagg.transceiver.wire.turns import TurnQueue

log = logging.getLogger(__name__)

HELLO_REPEAT_S = 0.5
"""A peer that starts late is found within half a second; HELLO is off the request path, no haste is needed."""

MAX_DETAIL_CHARS: Final = 1000
"""Of why a link is not ready: a sentence about each plane. Every lease carries it, and part of it is the peer's."""

RECONNECT_S = 1.0
"""Pause before a lost peer is tried again: the router lists it until its lease ends (3 s), so about three tries."""

SHORT_MAX_S: Final = 8.0
"""Where this process has no descriptor, memory or thread for the link the pause doubles up to here: each try takes some
of what is short from links that work. Eight seconds after there is room again the link is ready."""


class PeerRefused(TransceiverError):
    """The pair can never work: `field` names what differs."""

    def __init__(self, field: str, ours: str, theirs: str) -> None:
        super().__init__(f"{field}: ours {ours}, theirs {theirs}")
        self.field = field


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a data plane moved at first contact. `lane`: what it runs over, where its name does not say that."""

    peer: str
    plane: str
    lane: str
    gb_per_s: float


class PeerLink:
    """One source as this sink sees it. `run` connects and reconnects until cancelled."""

    def __init__(
        self,
        node: Node,
        target: PeerTarget,
        planes: Mapping[str, Callable[[], LandingPlane]],
        pools: Sequence[PoolRegion],
        on_message: Callable[[TransferMessage | Refused], None],
        on_lost: Callable[[str, str], Awaitable[None]],
        live_transfers: Callable[[str], Iterable[AttemptKey]],
        sockets: Sockets,
        faults: PeerFaults | None = None,
        on_settled: Callable[[str], None] = lambda incarnation: None,
    ) -> None:
        """`planes` in order of preference. `on_lost(incarnation, reason)` returns when no job uses the plane.

        `on_settled(incarnation)`: the link is ready, lost or refused, each time that it becomes so.
        """
        self._node, self.target = node, target
        self._planes, self._pools = planes, pools
        self._on_message, self._on_lost, self._live_transfers = on_message, on_lost, live_transfers
        self._sockets, self._faults = sockets, faults or PeerFaults()
        self._on_settled = on_settled
        self._pause_s = RECONNECT_S
        self._outbox: TurnQueue[PeerMessage] = TurnQueue()
        self._heard_at = 0.0
        self._state, self._detail = "connecting", ""
        self._is_ended = False
        self._plane_lost = asyncio.Event()
        self.plane: LandingPlane | None = None
        self.unit_nbytes: tuple[int, ...] = ()
        """Bytes of a unit per group where the peer's geometry differs; empty where a unit is a slot."""
        self.gb_per_s = 0.0
        self.meter = LinkMeter()
        self.purposes: tuple[str, ...] = ()
        """What may be fetched over it."""

    @property
    def is_ready(self) -> bool:
        return self._state == "ready"

    @property
    def is_connecting(self) -> bool:
        """For the first time: nothing is known of the peer yet."""
        return self._state == "connecting"

    def report(self) -> LinkReport:
        """What the lease says of this link."""
        state = self._state
        if state == "ready" and time.monotonic() - self._heard_at > SUSPECT_S:
            state = "suspect"
        plane = _named(self.plane) if self.plane else ""
        peer, meter = (self.target.incarnation, self.target.worker_id), self.meter
        return LinkReport(*peer, plane, state, meter.gb_per_s, self._detail, meter.latency_s)

    @property
    def speed(self) -> LinkSpeed | None:
        """None while no plane is open."""
        plane = self.plane
        return LinkSpeed(self.target.worker_id, plane.name, plane.lane, self.gb_per_s) if plane is not None else None

    def send(self, message: PeerMessage) -> None:
        """Queue `message`, in order; dropped with the connection (the core repeats what matters)."""
        self._outbox.put_nowait(message)

    def end(self) -> None:
        """Say that the cancellation which follows is meant for good.

        A task group in which a task fails at the moment of a cancellation raises the failure alone (and until Python
        3.13 `cancelling()` does not tell the two apart): the link would take it for one more loss and connect anew.
        """
        self._is_ended = True

    async def run(self) -> None:
        """Keep the link until told to `end`, or until the pair is refused for good."""
        while self._state != "refused" and not self._is_ended:
            failure: BaseException | None = None
            try:
                await self._connect_once()
            except* PeerRefused as refusal:
                self._note("refused", first_cause(refusal))
            except* (TransceiverError, TimeoutError) as group:  # whatever this peer is or does, others are served
                failure = first_cause(group)
            except* Exception as group:  # a fault of ours, or the machine's: it costs this link and no other
                failure = first_cause(group)
                log.error("the link to prefill worker %s failed", self.target.worker_id, exc_info=failure)
            if failure is not None:
                self._note("lost", failure)
            self._on_settled(self.target.incarnation)
            if not self._is_ended:
                await asyncio.sleep(self._next_pause(failure))

    def _next_pause(self, failure: BaseException | None) -> float:
        pause = self._pause_s if isinstance(failure, Shortage | OSError | MemoryError) else RECONNECT_S
        self._pause_s = min(2 * pause, SHORT_MAX_S)
        return pause

    async def _connect_once(self) -> None:
        client = await ControlClient.connect(self.target.endpoint, self._node.keys, self._sockets)
        try:
            await self._until_connected(client)
            welcome = await self._say_hello(client)
            self._heard_at = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(client))
                tasks.create_task(self._send_queued(client))
                tasks.create_task(self._beat())
                tasks.create_task(self._watch(client.lost(), "control connection"))
                # Under heartbeats: a plane without an answer, or a large mapping, may take longer than `LOST_S`, and
                # after that much silence the peer takes back the tokens of every plane that it offered.
                await self._open_plane(welcome)
                tasks.create_task(self._watch(self._plane_lost.wait(), "data plane"))
                self._state, self._detail, self._pause_s = "ready", "", RECONNECT_S
                self._on_settled(self.target.incarnation)
        finally:
            self._state = "lost"
            await to_the_end(self._close(client))

    async def _until_connected(self, client: ControlClient) -> None:
        try:
            async with asyncio.timeout(LOST_S):
                await client.ready()
        except TimeoutError:
            raise PeerLost(f"no connection to {self.target.endpoint} within {LOST_S:g} s") from None

    async def _say_hello(self, client: ControlClient) -> Welcome:
        node = self._node
        planes = tuple(self._planes)
        hello = Hello(node.incarnation, node.worker_id, node.identity, node.geometry, planes, node.receives)
        try:
            async with asyncio.timeout(LOST_S):
                while True:
                    await client.send(hello)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(HELLO_REPEAT_S):
                            return self._check_welcome(await client.recv())
        except TimeoutError:
            raise PeerLost(f"no answer to HELLO within {LOST_S:g} s") from None
        except ProtocolDiffers as other:
            raise PeerRefused(PROTOCOL_FIELD, other.ours, other.theirs) from other

    def _check_welcome(self, answer: object) -> Welcome:
        match answer:
            case Welcome() if answer.incarnation != self.target.incarnation:
                raise PeerLost("another process answers at its endpoint")
            case Welcome():
                ours, theirs = self._node.geometry, answer.geometry
                difference = differing_field(self._node.identity, answer.identity) or geometry_difference(
                    ours, theirs, joins_ranks=self._node.joins_ranks
                )
                if difference is not None:
                    raise PeerRefused(*difference)
                self.purposes = shared(answer.purposes, self._node.receives)
                return answer
            case Refused(field=field, ours=ours, theirs=theirs):
                raise PeerRefused(field, theirs, ours)
            case _:
                raise RemoteProtocolError(f"expected WELCOME, got {type(answer).__name__}")

    async def _open_plane(self, welcome: Welcome) -> None:
        offers = {offer.plane: offer for offer in welcome.planes}
        reasons, is_short = [], False
        for name, make in self._planes.items():
            if name not in offers:
                continue
            try:
                self.plane = await self._open_one(make, offers[name], welcome.geometry)
            except Exception as exc:
                is_short = is_short or isinstance(exc, Shortage)
                if not isinstance(exc, TransceiverError):
                    log.error("data plane %s to %s failed", name, self.target.worker_id, exc_info=exc)
                reasons.append(f"{name}: {exc}")
                continue
            self._say_which(self.plane, reasons)
            return
        told = "; ".join(reasons) or f"no common data plane: ours {list(self._planes)}, theirs {list(offers)}"
        raise Shortage(told) if is_short else PlaneRefused(told)

    async def _open_one(self, make: Callable[[], LandingPlane], offer: PlaneOffer, theirs: Geometry) -> LandingPlane:
        """A plane that is connected and measured. Raises whatever stands in its way; nothing of it is left then."""
        plane, pools = self._suited(make(), theirs)
        self._plane_lost = asyncio.Event()
        plane.on_lost = self._plane_lost.set
        try:
            await plane.connect(self._node.incarnation, offer, pools)
            self.gb_per_s = await measure(plane, pools)
            self.meter = LinkMeter(self.gb_per_s)
        except BaseException:
            await plane.close()
            raise
        return plane

    def _suited(self, plane: LandingPlane, theirs: Geometry) -> tuple[LandingPlane, Sequence[PoolRegion]]:
        """The plane for a sender of this geometry, and what to connect it with."""
        ours = self._node.geometry
        self.unit_nbytes = ()
        if moves_slots(ours, theirs, self._pools):
            return plane, self._pools
        reshaping = ReshapingPlane(plane, theirs, ours, self._pools)
        self.unit_nbytes = reshaping.cut.unit_nbytes
        return reshaping, reshaping.probe_pools

    def _say_which(self, plane: LandingPlane, refusals: Sequence[str]) -> None:
        """Name the plane, its speed, what it does not protect, and why none that was preferred is used."""
        name = self.target.worker_id
        for refusal in refusals:
            log.warning("prefill worker %s: cannot use data plane %s", name, refusal)
        log.info("prefill worker %s: data plane %s, %.2f GB/s at first contact", name, _named(plane), self.gb_per_s)
        if not plane.is_private:
            log.info("prefill worker %s: KV travels over %s unencrypted", name, plane.name)

    async def _receive(self, client: ControlClient) -> None:
        while True:
            message = await client.recv()
            try:
                self._hear(message)
            except PeerLost:
                raise
            except Exception as error:
                self._faults.blame(f"prefill worker {self.target.worker_id}", message, error)
                raise PeerLost(f"its {type(message).__name__} cannot be taken") from error

    def _hear(self, message: object) -> None:
        match message:
            case Heartbeat(source=source, destination=destination):
                if (source, destination) == (self.target.incarnation, self._node.incarnation):
                    self._heard_at = time.monotonic()
            case Refused(field=field) if field in {"stale_peer", "unknown_peer"}:
                raise PeerLost(f"it does not know this connection: {field}")
            case Refused():
                self._on_message(message)
            case Welcome():
                pass  # HELLO was repeated before its answer came
            case _ if (header := getattr(message, "header", None)) is not None:
                self._take(header, cast(TransferMessage, message))
            case _:
                log.warning("peer sent %s, which no decode worker takes", type(message).__name__)

    def _take(self, header: Header, message: TransferMessage) -> None:
        """A wrong incarnation changes nothing; a peer that speaks to another one is told so."""
        me = self._node.incarnation
        if header.destination != me:
            self.send(Refused("stale_peer", me, clipped(header.destination), clipped(header.destination)))
        elif header.source == self.target.incarnation:
            self._heard_at = time.monotonic()
            self._on_message(message)

    async def _send_queued(self, client: ControlClient) -> None:
        while True:
            message = await self._outbox.get()
            try:
                await client.send(message)
            except LocalProtocolError as fault:
                self._refuse_unsendable(message, str(fault))

    def _refuse_unsendable(self, message: PeerMessage, fault: str) -> None:
        """What no frame can carry ends its own transfer, as if the peer had refused it, and nothing else."""
        log.error("cannot send a %s: %s", type(message).__name__, fault)
        if (header := getattr(message, "header", None)) is not None:
            named = {"transfer_id": header.transfer_id, "epoch": header.epoch}
            self._on_message(Refused("message", "what one frame can carry", fault, **named))

    async def _beat(self) -> None:
        while True:
            live = tuple((key.transfer_id, key.epoch) for key in self._live_transfers(self.target.incarnation))
            for start in range(0, max(len(live), 1), MAX_NAMED_TRANSFERS):  # one that names none is a sign of life too
                named = live[start : start + MAX_NAMED_TRANSFERS]
                self.send(Heartbeat(self._node.incarnation, self.target.incarnation, named))
            await asyncio.sleep(HEARTBEAT_S)
            if time.monotonic() - self._heard_at > LOST_S:
                raise PeerLost(f"silent for {LOST_S:g} s")

    async def _watch(self, closed: Awaitable[object], what: str) -> None:
        await closed
        raise PeerLost(f"its {what} closed")

    async def _close(self, client: ControlClient) -> None:
        """Give up client and plane; landing jobs are joined before their mapping goes."""
        await self._on_lost(self.target.incarnation, "connection closed")
        self._outbox = TurnQueue()
        await client.close()
        plane, self.plane = self.plane, None
        if plane is not None:
            await plane.close()

    def _note(self, state: str, failure: BaseException) -> None:
        detail = clipped(str(failure), MAX_DETAIL_CHARS)
        if (state, detail) != (self._state, self._detail):
            log.warning("prefill worker %s %s: %s", self.target.worker_id, state, detail)
        self._state, self._detail = state, detail


def _named(plane: LandingPlane) -> str:
    """For people: the plane, and what it runs over where that is not clear from its name."""
    return f"{plane.name} ({plane.lane})" if plane.lane else plane.name


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` whole, and only then be cancelled: a peer and the router may be lost in the same moment."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    task.result()
    if cancelled is not None:
        raise cancelled
