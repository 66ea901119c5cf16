"""The router's connections: REGISTER, leases both ways, orders out, losses noticed. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from disagg.router.attempt_events import AnswerMessage, OrderMessage
from disagg.router.introductions import Connect, Introductions
from disagg.router.pulses import Pulses, Steps
from disagg.router.registry import Claimed, Registry, Worker
from disagg.transceiver.wire.codec import Message, encode
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, clipped
from disagg.transceiver.wire.faults import PeerFaults
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import (
    BROKEN,
    LEAVING,
    CancelRequest,
    Lease,
    Peers,
    Pulse,
    Register,
    Registered,
    RequestFailed,
)
from disagg.transceiver.wire.messages.tokens import TOKENS_WINDOW, StepTokens, TokenCredit
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S, SUSPECT_S
from disagg.transceiver.wire.turns import TurnQueue

log = logging.getLogger(__name__)

TICK_S: Final = 0.25
"""How often deadlines and leases are looked at: half a heartbeat, so a loss is seen within 3.25 s of the last sign."""


WORKERS_HEARD_A_SECOND: Final = 200
"""Leases with metrics, of some 60 samples: a tenth of a core. A thousand workers tell theirs every 5 s, a third of the
15 s at which Prometheus asks by default; a few workers with every lease."""


class ClusterListener(Protocol):
    """What is told of workers. All calls come from the event loop, one at a time."""

    def answered(self, source: str, message: AnswerMessage) -> None:
        """The registered worker of incarnation `source` spoke of a request."""

    def registered(self, worker: Worker) -> None:
        """A worker is registered."""

    def lost(self, incarnation: str, reason: str, in_step: Steps) -> None:
        """A worker is no longer registered; if it died, these were the new requests of its step."""

    def told_blocks(self, events: BlockEvents) -> None:
        """A registered worker told what its prefix cache registered and dropped."""

    def pressed(self, incarnation: str, transfers: Sequence[tuple[str, int]]) -> None:
        """A worker is short of blocks: it preempts these answers next."""

    def faulted(self) -> None:
        """A message could not be taken; its peer is dropped."""

    def is_serving(self, transfer_id: str, incarnation: str) -> bool:
        """Whether this worker should still hold this request."""

    def time_passed(self) -> None:
        """About `TICK_S` passed."""


class Cluster:
    """The registry joined to a control server. `run` moves messages; the other methods never wait."""

    def __init__(
        self,
        server: ControlServer,
        expected_fingerprint: str | None,
        listener: ClusterListener,
        clock: Callable[[], float] = time.monotonic,
        connect: Connect = "auto",
    ) -> None:
        self.incarnation = draw_id()
        self._pulses = Pulses(server.sockets, server.endpoint, self.incarnation, clock)
        self.registry = Registry(expected_fingerprint, self._pulses.heard_at)
        self._introductions = Introductions(self.registry, connect)
        self._server = server
        self._listener = listener
        self._clock = clock
        self._faults = PeerFaults()
        self._num_taken: dict[str, int] = {}
        """STEP_TOKENS messages taken of each registration."""
        self._route_of: dict[str, bytes] = {}
        self._incarnation_of: dict[bytes, str] = {}
        self._claims: dict[str, tuple[bytes, Register]] = {}
        """By the incarnation that has the name: the last REGISTER that asked for it, with its connection."""
        # Of what could not be sent, and what came after it. It drains at once: sending never waits.
        self._outbox: TurnQueue[tuple[bytes, Message | bytes]] = TurnQueue()

    @property
    def endpoint(self) -> str:
        return self._server.endpoint

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive())
                tasks.create_task(self._send())
                tasks.create_task(self._renew())
                tasks.create_task(self._watch())
        finally:
            self._pulses.close()

    def order(self, incarnation: str, message: OrderMessage | AskBlocks) -> None:
        """To a worker; dropped when it is lost, because its loss is told to the listener on its own."""
        if route := self._route_of.get(incarnation):
            self._post(route, message)

    def in_step(self, incarnation: str) -> Steps:
        """The new requests of the step that this worker last began; of one that died, until it is lost."""
        return self._pulses.in_step(incarnation)

    def sign_at(self, incarnation: str) -> float | None:
        """When this worker last gave a sign of life; None when it is not registered."""
        worker = self.registry.get(incarnation)
        return None if worker is None else self.registry.sign_at(worker)

    def check_invariants(self) -> None:
        self.registry.check_invariants()
        assert set(self._route_of) == {worker.incarnation for worker in self.registry}
        assert set(self._incarnation_of.values()) <= set(self._route_of)
        assert set(self._claims) <= set(self._route_of)
        assert set(self._num_taken) <= set(self._route_of)

    # --- in -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            self._hear(*await self._server.recv())  # whose turns end by time, so that streams take what came before

    def _hear(self, route: bytes, message: object) -> None:
        try:
            self._take(route, message)
        except Exception as fault:  # whatever a peer's message brings about here costs that peer alone
            self._blame(route, message, fault)

    def _take(self, route: bytes, message: object) -> None:
        match message:
            case Register():
                self._register(route, message)
            case Lease():
                self._take_lease(route, message)
            case Pulse():
                self._pulses.note(message)
            case StepTokens():
                self._take_tokens(route, message)
            case BlockEvents() if self._route_of.get(message.incarnation) == route:
                self._listener.told_blocks(message)
            case _ if isinstance(message, AnswerMessage):
                self._take_answer(route, message)
            case _:
                log.warning("dropped a %s: no message for a router", type(message).__name__)

    def _blame(self, route: bytes, message: object, fault: Exception) -> None:
        """End the registrations of this connection; the worker hears that it is not known here any more."""
        self._listener.faulted()
        known = self.registry.get(self._incarnation_of.get(route, ""))
        name = known.worker_id if known else getattr(message, "worker_id", route.hex())
        kind, told = type(message).__name__, clipped(repr(fault))
        self._faults.blame(f"worker `{clipped(name)}`", message, fault)
        incarnation = getattr(message, "incarnation", "")
        self._turn_away(route, incarnation)
        may_end = isinstance(message, Register) and self._is_own(incarnation, route)
        if may_end and (worker := self.registry.remove(incarnation)):
            self._forget(worker, f"its {kind} cannot be taken: {told}")
        self._lose_route(route, f"its {kind} cannot be taken: {told}")

    def _is_own(self, incarnation: str, route: bytes) -> bool:
        """Whether this connection may speak as `incarnation`: it registered it, or nothing is registered so.

        A worker that must connect anew draws another incarnation, so another connection is another process, or a
        message said again.
        """
        return self._route_of.get(incarnation, route) == route

    def _register(self, route: bytes, message: Register) -> None:
        if not self._is_own(message.incarnation, route):
            return self._turn_away(route, message.incarnation)
        is_new = self.registry.get(message.incarnation) is None
        answer = self.registry.register(message, self._clock())
        if isinstance(answer, Claimed):
            return self._probe(answer.rival, route, message)
        if isinstance(answer, Refused):
            log.warning(
                "refused worker `%s`: %s is %s, not %s", message.worker_id, answer.field, answer.theirs, answer.ours
            )
            self._drop_claim(message)
            return self._post(route, answer)
        self._know(message.incarnation, route)
        self._pulses.watch(message.incarnation, self._clock())
        self._post(route, self._registered(message.incarnation))
        return self._welcome(message, answer.superseded) if is_new else None

    def _drop_claim(self, message: Register) -> None:
        """A claim lies with the worker that has the name; with its loss it is taken up, and gone."""
        rival = self.registry.named(message.worker_id)
        if rival is not None and self._claims.get(rival.incarnation, (b"", None))[1] == message:
            del self._claims[rival.incarnation]

    def _registered(self, incarnation: str) -> Registered:
        credit = self._num_taken.get(incarnation, 0) + TOKENS_WINDOW
        metrics_every_s = len(self.registry) / WORKERS_HEARD_A_SECOND
        return Registered(self.incarnation, incarnation, self._pulses.port, credit, metrics_every_s)

    def _probe(self, rival: Worker, route: bytes, message: Register) -> None:
        """Send the holder of the name a message. If its connection is gone, that fails and the claimant gets in."""
        self._claims[rival.incarnation] = route, message
        self._post(self._route_of[rival.incarnation], Lease(self.incarnation, self.incarnation))

    def _know(self, incarnation: str, route: bytes) -> None:
        self._route_of[incarnation] = route
        self._incarnation_of[route] = incarnation

    def _welcome(self, message: Register, superseded: Worker | None) -> None:
        log.info("registered %s worker `%s`, pid %d on %s", message.role, message.worker_id, message.pid, message.host)
        if superseded is not None:
            self._forget(superseded, "a new process registered under its name")
        if (worker := self.registry.get(message.incarnation)) is not None:
            self._listener.registered(worker)
            self._tell(self._introductions.of_new(worker))

    def _take_lease(self, route: bytes, lease: Lease) -> None:
        is_ours = lease.router_incarnation == self.incarnation and self._is_own(lease.incarnation, route)
        if not is_ours or not self.registry.renew(lease, self._clock()):
            return self._turn_away(route, lease.incarnation)
        if lease.state in (LEAVING, BROKEN) and (worker := self.registry.remove(lease.incarnation)):
            return self._say_farewell(worker, lease)
        if (peers := self._introductions.of_links(lease)) is not None:
            self._post(route, peers)
        if lease.pressed:
            self._listener.pressed(lease.incarnation, lease.pressed)
        return self._cancel_unknown(lease)

    def _turn_away(self, route: bytes, incarnation: str) -> None:
        """This connection does not speak for `incarnation` here: a worker that hears so registers anew."""
        self._post(route, Refused("stale_peer", self.incarnation, incarnation, incarnation))

    def _say_farewell(self, worker: Worker, lease: Lease) -> None:
        if lease.state == LEAVING:
            return self._forget(worker, "it left", {}, level=logging.INFO)
        return self._forget(worker, "its model thread died", dict(lease.requests))

    def _cancel_unknown(self, lease: Lease) -> None:
        """A worker may still hold what the router ended: a cancel is lost with the connection it was queued on."""
        for transfer_id, epoch in lease.requests:
            if not self._listener.is_serving(transfer_id, lease.incarnation):
                self.order(lease.incarnation, CancelRequest(transfer_id, epoch, "unknown"))

    def _take_answer(self, route: bytes, message: AnswerMessage) -> None:
        source = self._incarnation_of.get(route)
        if source is not None:  # else of a lost incarnation, whose requests have ended or moved on
            self._listener.answered(source, message)

    def _take_tokens(self, route: bytes, message: StepTokens) -> None:
        """Hand on the rows; when half of the worker's credit is spent, raise it to a whole window again."""
        source = self._incarnation_of.get(route)
        if source is None:
            return
        for row in message.rows():
            self._listener.answered(source, row)
        taken = self._num_taken[source] = self._num_taken.get(source, 0) + 1
        if taken % (TOKENS_WINDOW // 2) == 0:
            self._post(route, TokenCredit(taken + TOKENS_WINDOW))

    # --- out ------------------------------------------------------------------------------------------------

    def _post(self, route: bytes, message: Message | bytes) -> None:
        """Send it now, so that a request is with its workers before the next one is looked at.

        What cannot be sent waits for `_send`: a loss is told to the listener, which may be in the middle of something.
        """
        if self._outbox.empty():
            with contextlib.suppress(PeerLost, LocalProtocolError):
                self._server.send_now(route, message)
                return
        self._outbox.put_nowait((route, message))

    async def _send(self) -> None:
        while True:
            route, message = await self._outbox.get()
            try:
                await self._server.send(route, message)
            except PeerLost as exc:
                self._lose_route(route, str(exc))
            except LocalProtocolError as exc:
                self._fail_unsendable(route, message, str(exc))

    def _fail_unsendable(self, route: bytes, message: Message | bytes, reason: str) -> None:
        """A request that no message can carry (too large, a token id beyond 64 bits) ends alone; others go on."""
        log.error("cannot send a %s: %s", type(message).__name__, reason)
        transfer_id, epoch = getattr(message, "transfer_id", ""), getattr(message, "epoch", 0)
        self._take_answer(route, RequestFailed(transfer_id, epoch, 400, f"the request cannot be sent: {reason}"))

    async def _renew(self) -> None:
        lease = encode(Lease(self.incarnation, self.incarnation))
        while True:
            for route in set(self._route_of.values()):
                self._post(route, lease)
            await asyncio.sleep(HEARTBEAT_S)

    def _tell(self, told: Iterable[tuple[Worker, Peers]]) -> None:
        for worker, peers in told:
            self._post(self._route_of[worker.incarnation], peers)

    # --- losses and time ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        seen_at = self._clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            # After a pause of this process itself (a stopped machine, a starved core) leases lie unread in the
            # socket: read them before anyone is called lost.
            if now - seen_at < SUSPECT_S:
                self._expire(now)
            seen_at = now
            self._listener.time_passed()

    def _expire(self, now: float) -> None:
        for worker in self.registry.expire(now):
            self._forget(worker, f"no lease for {LOST_S:g} s")

    def _lose_route(self, route: bytes, reason: str) -> None:
        incarnation = self._incarnation_of.get(route)
        if incarnation is not None and (worker := self.registry.remove(incarnation)):
            self._forget(worker, reason)

    def _forget(self, worker: Worker, reason: str, in_step: Steps | None = None, level: int = logging.WARNING) -> None:
        """`worker` has left the registry: tell the listener, and its sinks that it is no peer any more.

        `in_step`: what its death is charged to, if it says so itself.
        """
        incarnation = worker.incarnation
        log.log(level, "lost %s worker `%s`: %s", worker.role, worker.worker_id, reason)
        if in_step is None:
            in_step = self._pulses.in_step(incarnation)
        self._pulses.forget(incarnation)
        self._num_taken.pop(incarnation, None)
        self._incarnation_of.pop(self._route_of.pop(incarnation, b""), None)
        self._listener.lost(incarnation, reason, in_step)
        self._tell(self._introductions.of_lost(worker))
        if claim := self._claims.pop(incarnation, None):
            self._register(*claim)
