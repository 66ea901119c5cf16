"""The worker's side of its registration: REGISTER until answered, leases both ways, and the loss of the router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from disagg.transceiver.errors import PeerLost, TransceiverError
from disagg.transceiver.links import ControlClient
from disagg.transceiver.messages.peer import Refused
from disagg.transceiver.messages.router import LEAVING, Lease, Register, Registered, RouterMessage
from disagg.transceiver.node import Node
from disagg.transceiver.sockets import Sockets
from disagg.transceiver.timing import HEARTBEAT_S, LOST_S

log = logging.getLogger(__name__)

REGISTER_REPEAT_S = 0.5
"""REGISTER is repeated until answered. Two a second is as often as leases: a router that starts late is found at once
by a person's measure, and a thousand workers waiting for one cost it 2,000 small messages a second."""

NEXT_STEPS: Final[Mapping[str, str]] = {
    "protocol_major": "install the same version of disagg everywhere",
    "model_fingerprint": "give router and workers the same checkpoint, and `--verify-weights` to all or to none",
    "attention": "give all workers the same config.json and the same version of transformers",
    "compute_dtype": "give all workers the same `--dtype`",
    "max_model_len": "give all workers the same `--max-model-len`",
    "hash_key_id": "give router and workers the same secret",
    "role": "start it with `disagg prefill`, `disagg decode` or `disagg both`",
}
"""What to do about a refusal, by the field that differs."""


class RouterLost(PeerLost):
    """No sign of the router for `LOST_S`, or its socket closed: its requests end and the worker registers anew."""


class RegistrationRefused(TransceiverError):
    """The router will not have this worker: the field, both values, what to do. Final: the process exits 2."""


class RouterLink:
    """One registration at one router. Use `open`, then `messages` and `send`; leases run while `keep` runs."""

    def __init__(self, client: ControlClient, node: Node, make_lease: Callable[[str], Lease]) -> None:
        self._client = client
        self._node = node
        self._make_lease = make_lease
        self._heard_at = time.monotonic()
        self._outbox: asyncio.Queue[RouterMessage] = asyncio.Queue()
        self.router_incarnation = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, endpoint: str, node: Node, sockets: Sockets, register: Register, make_lease: Callable[[str], Lease]
    ) -> AsyncIterator[RouterLink]:
        """Connect and register; repeats until a router answers. Raises `RegistrationRefused`, `RouterLost`."""
        client = await ControlClient.connect(endpoint, node.keys, sockets)
        try:
            link = cls(client, node, make_lease)
            await link._register(register)
            yield link
        finally:
            await client.leave(Lease(node.incarnation, link.router_incarnation, LEAVING))

    def send(self, message: RouterMessage) -> None:
        """Queue `message` for the router, in order. Never blocks; lost with the registration if the router is lost."""
        self._outbox.put_nowait(message)

    def renew(self) -> None:
        """Queue a lease now, beside those that go out every heartbeat."""
        self.send(self._make_lease(self.router_incarnation))

    async def flushed(self) -> None:
        """Wait until every queued message was handed to the socket."""
        await self._outbox.join()

    async def next_message(self) -> RouterMessage:
        """The router's next message other than its leases. Raises `RouterLost` when the router no longer knows us."""
        while True:
            message: RouterMessage | Refused = await self._receive()
            self._heard_at = time.monotonic()
            match message:
                case Lease(router_incarnation=incarnation) | Registered(router_incarnation=incarnation):
                    if incarnation != self.router_incarnation:
                        raise RouterLost("another router answers at this endpoint")
                case Refused(field=field):
                    raise RouterLost(f"the router dropped this registration: {field}")
                case _:
                    return message

    async def keep(self) -> None:
        """Send leases and queued messages until the router is lost. Raises `RouterLost`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_queued())
            tasks.create_task(self._watch())
            tasks.create_task(self._renew())

    async def _register(self, register: Register) -> None:
        waited_since = time.monotonic()
        told = False
        while True:
            with contextlib.suppress(PeerLost):  # not connected yet: asked again after the pause
                await self._client.send(register)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_REPEAT_S):
                    return self._read_answer(await self._receive())
            if not told and time.monotonic() - waited_since > LOST_S:
                told = True
                log.warning("no answer from the router yet, still asking; is `disagg router` running?")

    async def _receive(self) -> Any:
        try:
            return await self._client.recv()
        except PeerLost as exc:
            raise RouterLost(str(exc)) from exc

    def _read_answer(self, answer: object) -> None:
        match answer:
            case Registered(router_incarnation=router, incarnation=mine) if mine == self._node.incarnation:
                self.router_incarnation = router
                self._heard_at = time.monotonic()
            case Refused(field=field, ours=ours, theirs=theirs):
                raise RegistrationRefused(
                    f"the router refuses this worker: {field}: it has {ours}, this worker {theirs}; "
                    + NEXT_STEPS.get(field, "start it as the workers that are registered were")
                )
            case _:
                raise RouterLost(f"expected REGISTERED, got {type(answer).__name__}")

    async def _send_queued(self) -> None:
        while True:
            message = await self._outbox.get()
            try:
                await self._client.send(message)
            except PeerLost as exc:
                raise RouterLost(str(exc)) from exc
            self._outbox.task_done()

    async def _renew(self) -> None:
        while True:
            self.renew()
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch(self) -> None:
        closed = asyncio.ensure_future(self._client.lost())
        try:
            while not closed.done():
                await asyncio.wait({closed}, timeout=HEARTBEAT_S)
                if time.monotonic() - self._heard_at > LOST_S:
                    raise RouterLost(f"no lease from the router for {LOST_S:g} s")
            raise RouterLost("the router closed the connection")
        finally:
            closed.cancel()
