"""A sending side that runs over real sockets, without an engine; decode workers by hand, who say what a test likes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from support.event_loop import within
from support.links.transfer_pair import COMPUTE_ID, DEADLINE_S, FIRST, GEOMETRY, KEYS, PROMPT, UNIT_NBYTES, needed_of

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.inproc import InprocHub, InprocSourcePlane
from disagg.transceiver.protocol.events import Pinned, PromptComputed, UnitsFinal
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.links import ControlClient, ControlServer
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import AttemptKey, GroupRuns, Identity
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets

IDENTITY = Identity(1, "f" * 32, "attention", "float32", 200, KEYS.hash_key_id)
REQUIRED = (GroupRuns(0, ((0, 7),)), GroupRuns(1, ((4, 3),)))


def pools() -> tuple[PoolRegion, ...]:
    return (PoolRegion(np.zeros((4, 4096), np.uint8), np.zeros(4, np.uint64), -1, 0),)


@dataclass
class Host:
    """What the side asked of its worker, in order."""

    pins: list[AttemptKey] = field(default_factory=list)
    releases: list[tuple[AttemptKey, str]] = field(default_factory=list)

    def pin(self, key: AttemptKey) -> None:
        self.pins.append(key)

    def release_source(self, key: AttemptKey, reason: str) -> None:
        self.releases.append((key, reason))

    def unregister(self, key: AttemptKey, units: Any) -> None: ...


@dataclass
class Prefill:
    side: SendingSide
    server: ControlServer
    sockets: Sockets
    node: Node
    hub: InprocHub
    host: Host

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, planes: Mapping[str, SourcePlane] | None = None) -> AsyncIterator[Prefill]:
        """`planes`: those that are offered, `inproc` unless told otherwise."""
        hub, sockets = InprocHub(), Sockets(KEYS)
        server = ControlServer.bind("tcp://127.0.0.1:0", KEYS, sockets)
        node = Node(draw_id(), "prefill", IDENTITY, GEOMETRY, KEYS)
        planes = planes if planes is not None else {"inproc": InprocSourcePlane(hub)}
        host = Host()
        side = SendingSide(node, server, planes, host)
        for plane in planes.values():
            await plane.start(pools())
        running = asyncio.create_task(side.run())
        try:
            yield cls(side, server, sockets, node, hub, host)
            assert not running.done(), running.exception()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            for plane in planes.values():
                await plane.close()
            await server.close()
            sockets.close()

    def dispatch(self, peer: Peer, key: AttemptKey) -> None:
        """The router's word: serve `key` to `peer`."""
        self.side.start(
            key,
            Sender(
                Ends(key.transfer_id, key.epoch, self.node.incarnation, peer.incarnation),
                Offer(
                    prompt=PROMPT,
                    geometry=GEOMETRY,
                    unit_nbytes=UNIT_NBYTES,
                    planes={"inproc": False},
                    keys=KEYS,
                    ttl_s=DEADLINE_S,
                    part=Part.whole(GEOMETRY.groups),
                ),
                asyncio.get_running_loop().time(),
            ),
        )

    def compute(self, key: AttemptKey) -> None:
        """The engine pins the blocks and computes the prompt."""
        for event in (Pinned(COMPUTE_ID), UnitsFinal(COMPUTE_ID, needed_of()), PromptComputed(COMPUTE_ID, FIRST)):
            self.side.feed(key, event)

    def core(self, key: AttemptKey) -> Transfer | None:
        return self.side._transfers._live.get(key)


class Peer:
    """A decode worker. It beats only when told to."""

    def __init__(self, client: ControlClient, prefill: Prefill) -> None:
        self.client, self._prefill = client, prefill
        self.incarnation = draw_id()

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, prefill: Prefill, incarnation: str = "") -> AsyncIterator[Peer]:
        client = await ControlClient.connect(prefill.server.endpoint, KEYS, prefill.sockets)
        try:
            await within(client.ready())
            peer = cls(client, prefill)
            peer.incarnation = incarnation or peer.incarnation
            yield peer
        finally:
            await client.close()

    @classmethod
    @contextlib.asynccontextmanager
    async def known(cls, prefill: Prefill) -> AsyncIterator[Peer]:
        """One that has said HELLO and was welcomed."""
        async with cls.connected(prefill) as peer:
            await peer.hello()
            yield peer

    async def hello(self, **changes: Any) -> p.Welcome:
        await self.say(replace(p.Hello(self.incarnation, "decode", IDENTITY, GEOMETRY, ("inproc",)), **changes))
        welcome: p.Welcome = await self.next(p.Welcome)
        return welcome

    async def say(self, message: Any) -> None:
        await self.client.send(message)

    async def next(self, kind: type) -> Any:
        """The next message of `kind`; others are read past."""
        async with asyncio.timeout(5):
            while not isinstance(message := await self.client.recv(), kind):
                pass
        return message

    async def was_heard(self) -> None:
        """Until everything said so far was dealt with: a last question has been answered."""
        transfer_id = draw_id()
        await self.say(p.Ack(self.header(AttemptKey(transfer_id, 1))))
        while (await self.next(p.Closed)).header.transfer_id != transfer_id:
            pass

    def header(self, key: AttemptKey) -> p.Header:
        return p.Header(self.incarnation, self._prefill.node.incarnation, key.transfer_id, key.epoch, 1)

    def beat(self, *keys: AttemptKey) -> p.Heartbeat:
        named = tuple((key.transfer_id, key.epoch) for key in keys)
        return p.Heartbeat(self.incarnation, self._prefill.node.incarnation, named)

    def fetch(self, key: AttemptKey) -> p.Fetch:
        """With the ticket that the router gave for it."""
        shown = ticket.mint(
            KEYS.ticket,
            transfer_id=key.transfer_id,
            epoch=key.epoch,
            prefill=self._prefill.node.incarnation,
            decode=self.incarnation,
            prompt=PROMPT,
            ttl_s=DEADLINE_S,
        )
        return p.Fetch(self.header(key), shown, len(PROMPT), REQUIRED, "inproc")


def new_key() -> AttemptKey:
    return AttemptKey(draw_id(), 1)
