"""One plane's two ends over real pools, whatever the plane: what the conformance suite drives."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest
from support.links.pools import close_pools, make_pools

from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.planes.base import LandingPlane, SourcePlane
from disagg.transceiver.planes.inproc import InprocHub, InprocLandingPlane, InprocSourcePlane
from disagg.transceiver.planes.shm.plane import ShmLandingPlane, ShmSourcePlane
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane
from disagg.transceiver.planes.tcp.source import TcpSourcePlane
from disagg.transceiver.planes.ucx.landing import UcxLandingPlane
from disagg.transceiver.planes.ucx.source import UcxSourcePlane
from disagg.transceiver.planes.zmq.landing import ZmqLandingPlane
from disagg.transceiver.planes.zmq.source import ZmqSourcePlane
from disagg.transceiver.wire.keys import ClusterKeys

PLANES = ("inproc", "shm", "tcp", "ucx", "zmq", "zmq-insecure")
KEYS = ClusterKeys.from_secret(b"the secret of the planes under test")
SHAPES = ((24, 1 << 12), (10, 3000))
"""Two pools: (slots, bytes per slot). The second's slots are no multiple of anything."""

Pairs = Sequence[tuple[int, int, int]]
"""(pool, source slot, destination slot) of each unit."""


@dataclass
class Receiver:
    """A decode worker: its incarnation, its pools, and its end of the plane."""

    plane: LandingPlane
    pools: tuple[PoolRegion, ...]
    incarnation: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass
class PlanePair:
    """A prefill worker's end of one plane, and a factory of receivers."""

    kind: str
    source: SourcePlane
    pools: tuple[PoolRegion, ...]
    hub: InprocHub
    keys: ClusterKeys
    receivers: list[Receiver] = field(default_factory=list)

    def make_landing(self) -> LandingPlane:
        match self.kind:
            case "inproc":
                return InprocLandingPlane(self.hub)
            case "shm":
                return ShmLandingPlane()
            case "tcp":
                return TcpLandingPlane()
            case "ucx":
                return UcxLandingPlane()
            case _:
                return ZmqLandingPlane(self.keys)

    async def receiver(self, incarnation: str = "") -> Receiver:
        """A connected receiver with pools of its own."""
        receiver = Receiver(self.make_landing(), make_pools(SHAPES, seed=1000 + len(self.receivers)))
        receiver.incarnation = incarnation or receiver.incarnation
        self.receivers.append(receiver)
        offer = self.source.offer(receiver.incarnation)
        await receiver.plane.connect(receiver.incarnation, offer, receiver.pools)
        return receiver

    async def move(
        self, receiver: Receiver, pairs: Pairs, *, transfer_id: str = "t", epoch: int = 1, number: int = 0
    ) -> int:
        """Move units end to end as one slice, as the shells do; returns the bytes landed."""
        job = self.job(pairs, transfer_id=transfer_id, epoch=epoch, number=number)
        return await self.carry_out(receiver, job, self.units(pairs))

    async def carry_out(self, receiver: Receiver, job: LandingJob, units: Sequence[SourceUnit]) -> int:
        if self.source.sends_bytes:
            await self.source.send(receiver.incarnation, job.transfer_id, job.epoch, job.number, units)
        await receiver.plane.fetch(job)
        return await asyncio.to_thread(receiver.plane.land, job)

    def units(self, pairs: Pairs) -> list[SourceUnit]:
        """Planned with the generations that hold now."""
        return [
            SourceUnit(pool, ordinal, pool, slot, int(self.pools[pool].generations[slot]))
            for ordinal, (pool, slot, _) in enumerate(pairs)
        ]

    def job(self, pairs: Pairs, *, transfer_id: str = "t", epoch: int = 1, number: int = 0) -> LandingJob:
        destinations = [
            Destination(pool, ordinal, pool, to, *self._seen(pool, slot))
            for ordinal, (pool, slot, to) in enumerate(pairs)
        ]
        return LandingJob("source", transfer_id, epoch, number, tuple(destinations))

    def _seen(self, pool: int, slot: int) -> tuple[int, int]:
        """What SLICE says of a source slot: nothing where the sender sends the bytes."""
        return (-1, -1) if self.source.sends_bytes else (slot, int(self.pools[pool].generations[slot]))


@contextlib.asynccontextmanager
async def plane_pair(kind: str) -> AsyncIterator[PlanePair]:
    """A started source; on exit everything is closed."""
    if kind == "ucx" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    hub = InprocHub()
    keys = ClusterKeys.published() if kind == "zmq-insecure" else KEYS
    pair = PlanePair(kind, _make_source(kind, hub, keys), make_pools(SHAPES), hub, keys)
    try:
        await pair.source.start(pair.pools)
        yield pair
    finally:
        for receiver in pair.receivers:
            await receiver.plane.close()
            close_pools(receiver.pools)
        await pair.source.close()
        close_pools(pair.pools)


def _make_source(kind: str, hub: InprocHub, keys: ClusterKeys) -> SourcePlane:
    match kind:
        case "inproc":
            return InprocSourcePlane(hub)
        case "shm":
            return ShmSourcePlane()
        case "tcp":
            return TcpSourcePlane("127.0.0.1", keys)
        case "ucx":
            return UcxSourcePlane("127.0.0.1", keys)
        case _:
            return ZmqSourcePlane("127.0.0.1", keys)
