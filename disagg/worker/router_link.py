"""The worker's side of its registration: REGISTER until answered, leases both ways, and the loss of the router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, ProtocolDiffers, TransceiverError
from disagg.transceiver.wire.links import PROTOCOL_FIELD, ControlClient
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import (
    BROKEN,
    LEAVING,
    Lease,
    Register,
    Registered,
    RouterMessage,
)
from disagg.transceiver.wire.messages.tokens import TokenCredit, Tokens
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S
from disagg.transceiver.wire.turns import TurnQueue
from disagg.worker.lease_news import LeaseNews
from disagg.worker.token_outbox import TokenOutbox, shorter
from disagg.worker.vitals import RouterPulse, Vitals

log = logging.getLogger(__name__)

REGISTER_REPEAT_S = 0.5
"""REGISTER is repeated until answered. Two a second is as often as leases: a router that starts late is found in well
under a second, and a thousand workers that wait cost it 2,000 small messages a second."""

UNHEARD: Final = (
    "no pulse from the router at its port {port}: open it beside the control port, "
    "else a router or worker that is busy for {lost_s:g} s counts as lost"
)

NEXT_STEPS: Final[Mapping[str, str]] = {
    PROTOCOL_FIELD: "install the same version of disagg everywhere",
    "protocol_major": "install the same version of disagg everywhere",
    "model_fingerprint": "give router and workers the same checkpoint, and `--verify-weights` to all or to none",
    "attention": "give all workers the same config.json and the same version of transformers",
    "compute_dtype": "give all workers the same `--dtype`",
    "max_model_len": "give all workers the same `--max-model-len`",
    "hash_key_id": "give router and workers the same secret",
    "worker_id": "give every worker a name of its own with `--worker-id`, or end the other one first",
    "role": "start it with `disagg prefill`, `disagg decode` or `disagg both`",
}
"""What to do about a refusal, by the field that differs."""


class RouterLost(PeerLost):
    """No sign of the router for `LOST_S`, or its socket closed: its requests end and the worker registers anew."""


class RegistrationRefused(TransceiverError):
    """The router will not have this worker: the field, both values, what to do. Final: the process exits 2."""


class RouterLink:
    """One registration at one router. Use `open`, then `messages` and `send`; leases run while `keep` runs."""

    def __init__(
        self,
        client: ControlClient,
        node: Node,
        make_lease: Callable[[str], Lease],
        vitals: Vitals | None = None,
        on_hold: Callable[[bool], None] = lambda is_held: None,
    ) -> None:
        self._client = client
        self._vitals = vitals
        self._pulse: RouterPulse | None = None
        self._pulse_port = 0
        self._node = node
        self._make_lease = make_lease
        self._heard_at = time.monotonic()
        # Bounded by what enters: leases, and a few messages per attempt. Tokens wait in `tokens`, for credit.
        self._outbox: TurnQueue[RouterMessage] = TurnQueue()
        self.tokens = TokenOutbox(self._outbox.put_nowait, on_hold)
        self._news = LeaseNews(time.monotonic)
        self.router_incarnation = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        endpoint: str,
        node: Node,
        sockets: Sockets,
        register: Register,
        make_lease: Callable[[str], Lease],
        vitals: Vitals | None = None,
        on_hold: Callable[[bool], None] = lambda is_held: None,
    ) -> AsyncIterator[RouterLink]:
        """Connect and register; repeats until a router answers. Raises `RegistrationRefused`, `RouterLost`.

        Without `vitals` this worker lives by the leases of its event loop alone. `on_hold`: see `TokenOutbox`.
        """
        client = await ControlClient.connect(endpoint, node.keys, sockets)
        link = cls(client, node, make_lease, vitals, on_hold)
        try:
            await link._register(register)
            link._begin_pulses(endpoint)
            yield link
        finally:
            link.tokens.close()
            link._end_pulses()
            await client.leave(link._last_word())

    def send(self, message: RouterMessage | Tokens) -> None:
        """Queue `message` for the router, in order within an attempt. Never blocks; lost with the registration.

        Tokens leave together when this turn of the loop ends, as far as the router's credit goes; what is said of an
        attempt after its tokens waits behind them.
        """
        if not isinstance(message, Tokens):
            if not self.tokens.follow(message):
                self._outbox.put_nowait(message)
        elif self.tokens.add(message):
            asyncio.get_running_loop().call_soon(self.tokens.flush)

    def renew(self) -> None:
        """Queue a lease now, beside those that go out every heartbeat."""
        self.send(self._news.of(self._make_lease(self.router_incarnation)))

    async def flushed(self) -> None:
        """Wait until every queued message was handed to the socket."""
        await self._outbox.join()

    async def next_message(self) -> RouterMessage:
        """The router's next message other than its leases. Raises `RouterLost` when the router no longer knows us."""
        while True:
            try:
                message: RouterMessage | Refused = await self._receive()
            except ProtocolDiffers as exc:  # registering anew, the worker hears whether this is for good
                raise RouterLost(str(exc)) from exc
            self._heard_at = time.monotonic()
            match message:
                case Lease(router_incarnation=incarnation) | Registered(router_incarnation=incarnation):
                    if incarnation != self.router_incarnation:
                        raise RouterLost("another router answers at this endpoint")
                case Refused(field=field):
                    raise RouterLost(f"the router dropped this registration: {field}")
                case TokenCredit(limit=limit):
                    self.tokens.allow(limit)
                case _:
                    return message

    async def keep(self) -> None:
        """Send leases and queued messages until the router is lost. Raises `RouterLost`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_queued())
            tasks.create_task(self._watch())
            tasks.create_task(self._renew())

    def _begin_pulses(self, endpoint: str) -> None:
        if self._vitals is not None:
            me, router = self._node.incarnation, self.router_incarnation
            self._pulse = self._vitals.begin(endpoint, self._pulse_port, me, router, self.send)

    def _end_pulses(self) -> None:
        if self._vitals is not None:
            self._vitals.news.rest()
        if self._pulse is not None:
            self._pulse.close()

    def _last_word(self) -> Lease:
        """This registration ends: in good order, or because the model thread died."""
        me, router = self._node.incarnation, self.router_incarnation
        in_step = self._vitals.died_in if self._vitals is not None else None
        return Lease(me, router, LEAVING) if in_step is None else Lease(me, router, BROKEN, requests=in_step)

    def _is_silent(self) -> bool:
        """No sign of the router by either way."""
        pulse_at = self._pulse.heard_at if self._pulse is not None else float("-inf")
        return time.monotonic() - max(self._heard_at, pulse_at) > LOST_S

    async def _register(self, register: Register) -> None:
        waited_since = time.monotonic()
        told = False
        while True:
            with contextlib.suppress(PeerLost):  # not connected yet: asked again after the pause
                await self._client.send(register)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_REPEAT_S):
                    return await self._await_answer()
            if not told and time.monotonic() - waited_since > LOST_S:
                told = True
                log.warning("no answer from the router yet, still asking; is `disagg router` running?")

    async def _receive(self) -> Any:
        try:
            return await self._client.recv()
        except PeerLost as exc:
            raise RouterLost(str(exc)) from exc

    async def _await_answer(self) -> None:
        try:
            self._read_answer(await self._receive())
        except ProtocolDiffers as other:
            raise _refusal(PROTOCOL_FIELD, other.theirs, other.ours) from other

    def _read_answer(self, answer: object) -> None:
        match answer:
            case Registered(router_incarnation=router, incarnation=mine) if mine == self._node.incarnation:
                self.router_incarnation, self._pulse_port = router, answer.pulse_port
                self._heard_at = time.monotonic()
                self.tokens.allow(answer.credit)
                self._news.metrics_every_s = answer.metrics_every_s
            case Refused(field=field, ours=ours, theirs=theirs):
                raise _refusal(field, ours, theirs)
            case _:
                raise RouterLost(f"expected REGISTERED, got {type(answer).__name__}")

    async def _send_queued(self) -> None:
        while True:
            message = await self._outbox.get()
            try:
                await self._deliver(message)
            except PeerLost as exc:
                raise RouterLost(str(exc)) from exc
            self._outbox.task_done()

    async def _deliver(self, message: RouterMessage) -> None:
        """What no frame can carry ends its own attempt, if it decides one: the router is told so, and can answer."""
        try:
            await self._client.send(message)
        except LocalProtocolError as fault:
            log.error("cannot send a %s: %s", type(message).__name__, fault)
            if (word := shorter(message, str(fault))) is not None:
                await self._client.send(word)

    async def _renew(self) -> None:
        while True:
            self.renew()
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch(self) -> None:
        closed = asyncio.ensure_future(self._client.lost())
        told = False
        try:
            while not closed.done():
                await asyncio.wait({closed}, timeout=HEARTBEAT_S)
                if not told and self._pulse is not None and self._pulse.is_unheard:
                    told = True
                    log.warning("%s", UNHEARD.format(port=self._pulse_port, lost_s=LOST_S))
                if self._is_silent():
                    raise RouterLost(f"no lease from the router for {LOST_S:g} s")
            raise RouterLost("the router closed the connection")
        finally:
            closed.cancel()


def _refusal(field: str, ours: str, theirs: str) -> RegistrationRefused:
    """`ours` is the router's value."""
    step = NEXT_STEPS.get(field, "start it as the workers that are registered were")
    return RegistrationRefused(f"the router refuses this worker: {field}: it has {ours}, this worker {theirs}; {step}")
