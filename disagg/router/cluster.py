"""The router's connections: REGISTER, leases both ways, orders out, losses noticed. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from disagg.router.attempt_events import AnswerMessage, OrderMessage
from disagg.router.pairing import pair_difference
from disagg.router.registry import Registry, Worker
from disagg.transceiver.wire.codec import Message
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import (
    LEAVING,
    CancelRequest,
    Lease,
    Peers,
    Register,
    Registered,
    RequestFailed,
)
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S, SUSPECT_S

log = logging.getLogger(__name__)

TICK_S: Final = 0.25
"""How often deadlines and leases are looked at: half a heartbeat, so a loss is seen within 3.25 s of the last sign."""


class ClusterListener(Protocol):
    """Who is told. All calls come from the event loop, one at a time."""

    def answered(self, source: str, message: AnswerMessage) -> None:
        """The registered worker of incarnation `source` spoke of a request."""

    def lost(self, incarnation: str, reason: str) -> None:
        """A worker is no longer registered."""

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
    ) -> None:
        self.incarnation = draw_id()
        self.registry = Registry(expected_fingerprint)
        self._server = server
        self._listener = listener
        self._clock = clock
        self._route_of: dict[str, bytes] = {}
        self._introduced: dict[str, Peers] = {}
        # Unbounded, because what enters is bounded: a few messages per attempt of requests that are bounded
        # themselves, answers to messages received, and leases. It drains at once: sending never waits.
        self._outbox: asyncio.Queue[tuple[bytes, Message]] = asyncio.Queue()

    @property
    def endpoint(self) -> str:
        return self._server.endpoint

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._send())
            tasks.create_task(self._renew())
            tasks.create_task(self._watch())

    def order(self, incarnation: str, message: OrderMessage) -> None:
        """To a worker; dropped when it is lost, because its loss is told to the listener on its own."""
        if route := self._route_of.get(incarnation):
            self._post(route, message)

    def check_invariants(self) -> None:
        self.registry.check_invariants()
        assert set(self._route_of) == {worker.incarnation for worker in self.registry}
        assert set(self._introduced) <= set(self._route_of)

    # --- in -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            route, message = await self._server.recv()
            self._hear(route, message)

    def _hear(self, route: bytes, message: object) -> None:
        match message:
            case Register():
                self._register(route, message)
            case Lease():
                self._take_lease(route, message)
            case _ if isinstance(message, AnswerMessage):
                self._take_answer(route, message)
            case _:
                log.warning("dropped a %s: no message for a router", type(message).__name__)

    def _register(self, route: bytes, message: Register) -> None:
        is_new = self.registry.get(message.incarnation) is None
        answer = self.registry.register(message, self._clock())
        if isinstance(answer, Refused):
            log.warning(
                "refused worker `%s`: %s is %s, not %s", message.worker_id, answer.field, answer.theirs, answer.ours
            )
            return self._post(route, answer)
        self._route_of[message.incarnation] = route
        self._post(route, Registered(self.incarnation, message.incarnation))
        return self._welcome(message, answer.superseded) if is_new else None

    def _welcome(self, message: Register, superseded: Worker | None) -> None:
        log.info("registered %s worker `%s`, pid %d on %s", message.role, message.worker_id, message.pid, message.host)
        if superseded is not None:
            self._forget(superseded, "a new process registered under its name")
        self._introduce()

    def _take_lease(self, route: bytes, lease: Lease) -> None:
        if lease.router_incarnation != self.incarnation or not self.registry.renew(lease, self._clock()):
            return self._post(route, Refused("stale_peer", self.incarnation, lease.incarnation, lease.incarnation))
        if lease.state == LEAVING and (worker := self.registry.remove(lease.incarnation)):
            return self._forget(worker, "it left", level=logging.INFO)
        self._route_of[lease.incarnation] = route
        return self._cancel_unknown(lease)

    def _cancel_unknown(self, lease: Lease) -> None:
        """A worker may still hold what the router ended: a cancel is lost with the connection it was queued on."""
        for transfer_id, epoch in lease.requests:
            if not self._listener.is_serving(transfer_id, lease.incarnation):
                self.order(lease.incarnation, CancelRequest(transfer_id, epoch, "unknown"))

    def _take_answer(self, route: bytes, message: AnswerMessage) -> None:
        source = next((incarnation for incarnation, known in self._route_of.items() if known == route), None)
        if source is not None:  # else of a lost incarnation, whose requests have ended or moved on
            self._listener.answered(source, message)

    # --- out ------------------------------------------------------------------------------------------------

    def _post(self, route: bytes, message: Message) -> None:
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

    def _fail_unsendable(self, route: bytes, message: Message, reason: str) -> None:
        """A request that no message can carry (too large, a token id beyond 64 bits) ends alone; others go on."""
        log.error("cannot send a %s: %s", type(message).__name__, reason)
        transfer_id, epoch = getattr(message, "transfer_id", ""), getattr(message, "epoch", 0)
        self._take_answer(route, RequestFailed(transfer_id, epoch, 400, f"the request cannot be sent: {reason}"))

    async def _renew(self) -> None:
        while True:
            for route in set(self._route_of.values()):
                self._post(route, Lease(self.incarnation, self.incarnation))
            await asyncio.sleep(HEARTBEAT_S)

    def _introduce(self) -> None:
        """Tell each decode worker its prefill workers when they changed, so that first contact precedes a request."""
        for worker in self.registry:
            peers = self._peers_of(worker)
            if self._introduced.get(worker.incarnation, Peers(())) != peers:
                self._introduced[worker.incarnation] = peers
                self._post(self._route_of[worker.incarnation], peers)

    def _peers_of(self, worker: Worker) -> Peers:
        if worker.role != "decode":
            return Peers(())
        prefills = (other for other in self.registry if other.role == "prefill")
        return Peers(tuple(p.target for p in prefills if pair_difference(p.register, worker.register) is None))

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
        for incarnation, known in list(self._route_of.items()):
            if known == route and (worker := self.registry.remove(incarnation)):
                self._forget(worker, reason)

    def _forget(self, worker: Worker, reason: str, level: int = logging.WARNING) -> None:
        """`worker` has left the registry: tell the listener, and decode workers that it is no peer any more."""
        log.log(level, "lost %s worker `%s`: %s", worker.role, worker.worker_id, reason)
        self._route_of.pop(worker.incarnation, None)
        self._introduced.pop(worker.incarnation, None)
        self._listener.lost(worker.incarnation, reason)
        self._introduce()
