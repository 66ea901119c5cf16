"""Workers without a model, many in one process: they register at a router and emit tokens in steps of a fixed length.

    python -m disagg.bench.fleet --router tcp://127.0.0.1:8998 --pairs 2 --step-s 0.02 < secret

The link, its leases and its flow of tokens are a worker's own. `--direct-port` serves the same steps over HTTP
without a router: the floor that a router's overhead is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from disagg.bench.direct import serve_directly
from disagg.config.demo import demo_model_folder
from disagg.config.descriptors import raise_descriptor_limit
from disagg.engine.model.checkpoint import fingerprint
from disagg.transceiver.wire.keys import INSECURE_SECRET, ClusterKeys
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
from disagg.worker.router_link import RouterLink
from disagg.worker.vitals import Vitals

MAX_MODEL_LEN: Final = 1 << 18
GEOMETRY: Final = Geometry(16, "float32", (GroupSemantics(None, 0, 2, 16, (0,)),), (4096,))
TOKEN_IDS: Final = range(300, 1324)
"""Ordinary words of the bundled vocabulary, one after another."""


@dataclass(slots=True)
class FakeAnswer:
    """One request in the fake engine: `max_tokens` tokens, one per step."""

    dispatch: Dispatch
    num_tokens: int = 0


@dataclass(slots=True)
class FakeWorker:
    """One registration. `running` is what its steps emit for."""

    node: Node
    role: str
    step_s: float
    running: dict[str, FakeAnswer] = field(default_factory=dict)
    links: dict[str, LinkStatus] = field(default_factory=dict)
    num_emitted: int = 0
    link: RouterLink | None = None

    async def run(self, router: str, sockets: Sockets, vitals: Vitals | None, on_ready: Callable[[], None]) -> None:
        register = Register(
            incarnation=self.node.incarnation,
            worker_id=self.node.worker_id,
            role=self.role,
            identity=self.node.identity,
            geometry=GEOMETRY,
            planes=("shm",),
            peer_endpoint="tcp://127.0.0.1:1",
            pid=1,
            host="bench",
            device="none",
            num_slots=(1024,),
        )
        async with RouterLink.open(router, self.node, sockets, register, self._lease, vitals) as self.link:
            on_ready()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.link.keep())
                tasks.create_task(self._take_messages(self.link))
                tasks.create_task(self._step_on(self.link))

    def _lease(self, router_incarnation: str) -> Lease:
        requests = tuple((key, answer.dispatch.epoch) for key, answer in self.running.items())
        return Lease(
            self.node.incarnation,
            router_incarnation,
            requests=requests[:MAX_LEASED],
            num_running=len(requests),
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
                    self.running[dispatch.transfer_id] = FakeAnswer(dispatch)
                case CancelRequest(transfer_id=transfer_id):
                    self.running.pop(transfer_id, None)
                case Peers(peers=peers, gone=gone):
                    for incarnation in gone:
                        self.links.pop(incarnation, None)
                    for peer in peers:
                        self.links[peer.incarnation] = LinkStatus(peer.incarnation, peer.worker_id, "shm", "ready", 9.0)
                    link.renew()

    async def _step_on(self, link: RouterLink) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self.step_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self._step(link)

    def _step(self, link: RouterLink) -> None:
        for transfer_id, answer in list(self.running.items()):
            dispatch, index = answer.dispatch, answer.num_tokens
            link.send(Tokens(transfer_id, dispatch.epoch, index, (TOKEN_IDS[index % len(TOKEN_IDS)],)))
            answer.num_tokens += 1
            self.num_emitted += 1
            if answer.num_tokens == dispatch.sampling.max_tokens:
                link.send(Finished(transfer_id, dispatch.epoch, answer.num_tokens, "length"))
                del self.running[transfer_id]


def make_workers(pairs: int, keys: ClusterKeys, step_s: float) -> list[FakeWorker]:
    identity = Identity(1, fingerprint(demo_model_folder()), "full", "float32", MAX_MODEL_LEN, keys.hash_key_id)

    def make(name: str, role: str) -> FakeWorker:
        return FakeWorker(Node(draw_id(), name, identity, GEOMETRY, keys), role, step_s)

    prefills = [make(f"p{i}", "prefill") for i in range(pairs)]
    return prefills + [make(f"d{i}", "decode") for i in range(pairs)]


async def run(options: argparse.Namespace) -> None:
    """Register everything, say so on stdout, and emit tokens until stdin ends."""
    raise_descriptor_limit()
    keys = ClusterKeys.from_secret(INSECURE_SECRET, insecure=True)
    sockets = Sockets(keys)
    workers = make_workers(options.pairs, keys, options.step_s)
    num_ready, all_ready, began_at = 0, asyncio.Event(), time.monotonic()
    took: list[float] = []

    def note_ready() -> None:
        nonlocal num_ready
        num_ready += 1
        took.append(time.monotonic() - began_at)
        if num_ready == len(workers):
            all_ready.set()

    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(serve_directly(options.step_s))
        running = []
        for worker in workers:
            vitals = Vitals(sockets, lambda: True) if options.pulses else None
            running.append(asyncio.create_task(worker.run(options.router, sockets, vitals, note_ready)))
        await all_ready.wait()
        say({"event": "ready", "seconds": took[-1], "direct_port": port})
        await asyncio.to_thread(sys.stdin.read)
        say({"event": "end", "num_emitted": sum(worker.num_emitted for worker in workers)})
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    sockets.close()


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", required=True)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--pulses", action=argparse.BooleanOptionalAction, default=True)
    asyncio.run(run(parser.parse_args()))
