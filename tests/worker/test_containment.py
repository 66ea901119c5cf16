"""What the router sends costs an attempt, or the router its worker: never the worker's process."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from support.event_loop import in_event_loop
from support.links.extremes import messages
from support.links.sample_messages import ID, SAMPLES, SAMPLING
from support.model.engine_pair import LAYOUT, TestedEngine

from disagg.engine.commands import Command
from disagg.transceiver.wire.codec import decode
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.transceiver.wire.node import Node
from disagg.worker.attempts import Attempts
from disagg.worker.engine_events import EngineEvents
from disagg.worker.metrics import WorkerMetrics
from disagg.worker.pairing import Pairing
from disagg.worker.registration import Registration
from disagg.worker.router_link import RouterLost

GROUPS = tuple(GroupSemantics(g.window, g.num_sink_tokens, g.num_kv_heads, g.head_dim, g.layers) for g in LAYOUT.groups)
GEOMETRY = Geometry(LAYOUT.block_size, "float32", GROUPS, LAYOUT.slot_nbytes)
SERVE = r.Dispatch(ID, 2, "request", "serve", (1, 2, 30), SAMPLING, 600.0)


class Side:
    """Where transfers would begin."""

    held = ()

    def __contains__(self, key: object) -> bool:
        return False

    def knows(self, key: object) -> bool:
        return False

    def set_peers(self, targets: Any) -> None:
        self.peers = {target.incarnation for target in targets}

    def forget_peers(self, incarnations: Any) -> None: ...

    def reach(self, target: Any, then: Any = None) -> None:
        if then is not None:
            then()

    def plane_of(self, incarnation: str) -> str:
        return "shm"

    def start(self, *arguments: Any) -> None: ...

    def feed(self, *arguments: Any) -> None: ...


class Worker:
    """One registration over a tiny engine: messages in, commands applied at once, events handed back."""

    def __init__(self, role: str) -> None:
        self.engine = TestedEngine(role=role)
        self.said: list[Any] = []
        node = Node("me", role, Identity(1, "f", "a", "float32", 200, "h"), GEOMETRY, ClusterKeys.published())
        metrics = WorkerMetrics(["a", "b", "c"])
        pair = partial(Pairing, node, LAYOUT, {"shm": False})
        self.attempts = Attempts(self.submit, self.said.append, pair, metrics, fetch_wait_s=1.0)
        if role == "prefill":
            self.attempts.sending = Side()  # type: ignore[assignment]
        if role == "decode":
            self.attempts.receiving = Side()  # type: ignore[assignment]
        self.registration = Registration(SimpleNamespace(), node)  # type: ignore[arg-type]
        self.registration._attempts = self.attempts
        self.events = EngineEvents(SimpleNamespace(), self.attempts)  # type: ignore[arg-type]
        self.inbox: list[Command] = []

    def submit(self, command: Command) -> None:
        self.inbox.append(command)

    async def hear(self, message: Any) -> None:
        """Raises `RouterLost` when the message costs the registration, and nothing else."""
        link = SimpleNamespace(next_message=OneMessage(message))
        with contextlib.suppress(asyncio.CancelledError):
            await self.registration._take_messages(link)  # type: ignore[arg-type]
        while self.inbox:
            commands, self.inbox = self.inbox, []
            for event in [event for command in commands for event in self.engine.handle(command)]:
                self.events._hand_on(event)

    def cancel_all(self) -> None:
        for key in self.attempts.keys:
            self.attempts.cancel(key, "next")
        for command in self.inbox:
            self.engine.handle(command)
        self.inbox.clear()


class OneMessage:
    def __init__(self, message: Any) -> None:
        self.messages = [message]

    async def __call__(self) -> Any:
        if not self.messages:
            raise asyncio.CancelledError
        return self.messages.pop()


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
@in_event_loop
async def test_no_message_of_the_router_with_any_field_at_its_extremes_ends_the_worker(role: str) -> None:
    worker, num_heard, num_lost = Worker(role), 0, 0
    dispatches = [
        replace(SERVE, mode=mode, peer=r.PeerTarget(ID, "p", "tcp://127.0.0.1:1", GEOMETRY)) for mode in MODES
    ]
    for message in (*SAMPLES, *dispatches):
        for _, data in messages(message):
            try:
                heard = decode(data)
            except RemoteProtocolError:
                continue
            num_heard += 1
            try:
                await worker.hear(heard)
            except RouterLost:
                num_lost += 1
            worker.cancel_all()
    assert num_heard > 500
    assert num_lost < num_heard / 10, "most messages are legal, or about one attempt"
    assert worker.engine.stats().live_keys == ()


MODES = ("serve", "prefill", "decode")


@in_event_loop
async def test_a_dispatch_that_raises_ends_its_attempt_with_500(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("both")

    def fail(command: Any) -> None:
        raise ZeroDivisionError("by the test")

    monkeypatch.setattr(worker.attempts, "_submit", lambda command: fail(command) if command_is_new(command) else None)
    await worker.hear(SERVE)
    assert worker.said == [r.RequestFailed(ID, 2, 500, "a fault of this worker: Dispatch")]
    assert worker.attempts.keys == ()


def command_is_new(command: Any) -> bool:
    return type(command).__name__ == "Serve"


@in_event_loop
async def test_peers_that_cannot_be_taken_cost_the_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("decode")
    monkeypatch.setattr(worker.attempts.receiving, "set_peers", lambda targets: 1 // 0)
    with pytest.raises(RouterLost, match="its Peers cannot be taken"):
        await worker.hear(r.Peers(()))


@in_event_loop
async def test_peers_come_as_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("decode")
    first, second = (r.PeerTarget(name, name, "tcp://127.0.0.1:1") for name in ("p0", "p1"))
    await worker.hear(r.Peers((first,)))
    await worker.hear(r.Peers((second,)))
    assert worker.attempts.receiving.peers == {"p0", "p1"}  # type: ignore[union-attr]
    await worker.hear(r.Peers((), ("p0", "never was")))
    assert worker.attempts.receiving.peers == {"p1"}  # type: ignore[union-attr]
