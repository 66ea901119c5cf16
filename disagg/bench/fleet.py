"""Workers without a model, many in one process: they register at a router and emit tokens in steps of a fixed length.

    python -m disagg.bench.fleet --router tcp://127.0.0.1:8998 --pairs 2 --step-s 0.02 < secret

The link, its leases and its flow of tokens are a worker's own. `--direct-port` serves the same steps over HTTP
without a router: the floor that a router's overhead is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from disagg.bench.direct import serve_directly
from disagg.config.demo import demo_model_folder
from disagg.config.descriptors import raise_descriptor_limit
from disagg.engine.model.checkpoint import fingerprint
from disagg.transceiver.wire.errors import first_cause
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.ranges import MAX_LEASED
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    Lease,
    LinkStatus,
    Peers,
    Register,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.router_link import RouterLink, RouterLost
from disagg.worker.vitals import Vitals

MAX_MODEL_LEN: Final = 1 << 18
GEOMETRY: Final = Geometry(16, "float32", (GroupSemantics(None, 0, 2, 16, (0,)),), (4096,))
KEYS: Final = ClusterKeys.published()
MAX_PULSES: Final = 128
"""Workers with pulses, each of which takes a thread here; the others live by their leases."""
AT_ONCE: Final = 64
"""Workers that register at the same time, which this one process can answer for."""
SETTLE_S: Final = 2.0
"""Until a fleet that has registered at once does nothing but lease."""
TOKEN_IDS: Final = range(300, 1324)
"""Ordinary words of the bundled vocabulary, one after another."""


@cache
def identity() -> Identity:
    """Of a worker that serves the bundled model."""
    return Identity(1, fingerprint(demo_model_folder()), "full", "float32", MAX_MODEL_LEN, KEYS.hash_key_id)


def registration(incarnation: str, worker_id: str, role: str) -> Register:
    """What a worker of this fleet registers with."""
    return Register(
        incarnation=incarnation,
        worker_id=worker_id,
        role=role,
        identity=identity(),
        geometry=GEOMETRY,
        planes=("shm",),
        peer_endpoint="tcp://127.0.0.1:1",
        pid=1,
        host="bench",
        device="none",
        num_slots=(1024,),
    )


@dataclass(slots=True)
class FakeAnswer:
    """One request in the fake engine: `max_tokens` tokens, one per step."""

    dispatch: Dispatch
    num_tokens: int = 0


@dataclass(slots=True)
class FakeWorker:
    """One worker. `running` is what its steps emit for, `waiting` what has no seat yet."""

    node: Node
    role: str
    step_s: float
    num_seats: int = MAX_LEASED
    waiting: dict[str, FakeAnswer] = field(default_factory=dict)
    running: dict[str, FakeAnswer] = field(default_factory=dict)
    links: dict[str, LinkStatus] = field(default_factory=dict)
    has_work: asyncio.Event = field(default_factory=asyncio.Event)
    num_emitted: int = 0
    link: RouterLink | None = None

    async def run(self, router: str, sockets: Sockets, vitals: Vitals | None, on_ready: Callable[[], None]) -> None:
        register = registration(self.node.incarnation, self.node.worker_id, self.role)
        async with RouterLink.open(router, self.node, sockets, register, self._lease, vitals) as self.link:
            on_ready()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.link.keep())
                tasks.create_task(self._take_messages(self.link))
                tasks.create_task(self._step_on(self.link))

    def _lease(self, router_incarnation: str) -> Lease:
        answers = {**self.running, **self.waiting}
        requests = tuple((key, answer.dispatch.epoch) for key, answer in answers.items())
        return Lease(
            self.node.incarnation,
            router_incarnation,
            requests=requests[:MAX_LEASED],
            num_running=len(self.running),
            num_queued=len(self.waiting),
            blocks_used=(0,),
            blocks_free=(1024,),
            links=tuple(self.links.values()),
        )

    async def _take_messages(self, link: RouterLink) -> None:
        while True:
            match await link.next_message():
                case Dispatch(mode="prefill"):
                    pass
                case Dispatch() as dispatch:
                    self.waiting[dispatch.transfer_id] = FakeAnswer(dispatch)
                    self.has_work.set()
                case CancelRequest(transfer_id=transfer_id):
                    self.running.pop(transfer_id, None)
                    self.waiting.pop(transfer_id, None)
                case Peers(peers=peers, gone=gone):
                    for incarnation in gone:
                        self.links.pop(incarnation, None)
                    for peer in peers:
                        self.links[peer.incarnation] = LinkStatus(peer.incarnation, peer.worker_id, "shm", "ready", 9.0)
                    link.renew()

    async def _step_on(self, link: RouterLink) -> None:
        due = time.monotonic()
        while True:
            if not self.waiting and not self.running:
                self.has_work.clear()
                await self.has_work.wait()
            due = max(due + self.step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self._step(link)

    def _step(self, link: RouterLink) -> None:
        while self.waiting and len(self.running) < self.num_seats:
            transfer_id = next(iter(self.waiting))
            self.running[transfer_id] = self.waiting.pop(transfer_id)
        for transfer_id, answer in list(self.running.items()):
            dispatch, index = answer.dispatch, answer.num_tokens
            link.send(Tokens(transfer_id, dispatch.epoch, index, (TOKEN_IDS[index % len(TOKEN_IDS)],)))
            answer.num_tokens += 1
            self.num_emitted += 1
            if answer.num_tokens == dispatch.sampling.max_tokens:
                link.send(Finished(transfer_id, dispatch.epoch, answer.num_tokens, "length"))
                del self.running[transfer_id]


class FakeFleet:
    """Registers workers at one router, each in a task of its own, and says how long that took."""

    def __init__(self, router: str, step_s: float, *, num_seats: int = MAX_LEASED) -> None:
        self._router, self._step_s, self._num_seats = router, step_s, num_seats
        self._sockets = Sockets(KEYS)
        self._running: list[asyncio.Task[None]] = []
        self.workers: list[FakeWorker] = []
        self.num_losses = 0

    async def register(self, *roles: str) -> float:
        """One worker of each role: seconds until all of them are registered."""
        began_at, ready = time.monotonic(), [asyncio.Event() for _ in roles]
        for role, event in zip(roles, ready, strict=True):
            name = f"{role}-{len(self.workers)}"
            worker = FakeWorker(Node(draw_id(), name, identity(), GEOMETRY, KEYS), role, self._step_s, self._num_seats)
            vitals = Vitals(self._sockets, lambda: True) if len(self.workers) < MAX_PULSES else None
            self.workers.append(worker)
            self._running.append(asyncio.create_task(self._keep(worker, vitals, event.set)))
        await asyncio.gather(*(event.wait() for event in ready))
        return time.monotonic() - began_at

    async def _keep(self, worker: FakeWorker, vitals: Vitals | None, on_ready: Callable[[], None]) -> None:
        """Registered anew, under another incarnation, whenever the router has lost it, as a worker is."""
        while True:
            try:
                await worker.run(self._router, self._sockets, vitals, on_ready)
            except (ExceptionGroup, RouterLost) as end:
                if not isinstance(first_cause(end), RouterLost):
                    raise
            self.num_losses += 1
            worker.node = replace(worker.node, incarnation=draw_id())

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._sockets.close()


async def run(options: argparse.Namespace) -> None:
    """Register everything, say so on stdout, and emit tokens until stdin ends."""
    raise_descriptor_limit()
    fleet = FakeFleet(options.router, options.step_s)
    roles = ["prefill", "decode"] * options.pairs
    async with serve_directly(options.step_s) as port:
        seconds = 0.0
        for first in range(0, len(roles), AT_ONCE):
            seconds += await fleet.register(*roles[first : first + AT_ONCE])
        await asyncio.sleep(SETTLE_S if options.late else 0)
        last = await fleet.register("prefill", "decode") if options.late else seconds
        say({"event": "ready", "seconds": seconds, "last_seconds": last, "direct_port": port})
        await asyncio.to_thread(sys.stdin.read)
        say({"event": "end", "num_emitted": sum(worker.num_emitted for worker in fleet.workers)})
        await fleet.close()


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", required=True)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--late", action="store_true", help="one more pair once all others are registered")
    asyncio.run(run(parser.parse_args()))
