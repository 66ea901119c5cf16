"""disagg's own contenders: the sides that prefill and decode workers run, without a model behind them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from disagg.bench.cases import Case
from disagg.bench.side import ContenderSide
from disagg.cache.pool import SlotPool
from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.units import HashedUnit, SourceUnit
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.decode_side import ReceivingSide, TransferRecord
from disagg.transceiver.peers.landing_threads import LANDING_THREADS, LandingThreads
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.protocol.actions import ReportFailed, Verified
from disagg.transceiver.protocol.events import Pinned, PromptComputed, Reserved, UnitsFinal
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import (
    AttemptKey,
    FirstToken,
    Geometry,
    GroupRuns,
    GroupSemantics,
    Identity,
    SamplingState,
    UnitName,
)
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.plane_classes import landing_planes, source_planes

BLOCK_SIZE = 16
DTYPE = "bfloat16"
DEADLINE_S = 60.0
FIRST_TOKEN = FirstToken(0, None, SamplingState(0, ()))


class WorkerSide(ContenderSide):
    """What both ends have: a pool, keys, an identity, a landing thread."""

    by_layer = False

    def __init__(self, is_source: bool, plane: str, *, digests: bool) -> None:
        super().__init__(is_source, plane)
        self._digests = digests
        self._running: asyncio.Task[None]

    def _open(self, case: Case, secret: bytes) -> None:
        self.case = case
        self.keys = ClusterKeys.from_secret(secret)
        self.pool = SlotPool(case.slot_nbytes, case.pool_blocks)
        self.memory = self.pool.memory.numpy().reshape(-1)
        sides = self.pool.sides
        self.regions = (PoolRegion(sides.host.numpy(), sides.generations, sides.fd, sides.slots_offset),)
        group = GroupSemantics(self.window, 0, 1, 1, tuple(range(case.num_layers)))
        self.geometry = Geometry(BLOCK_SIZE, DTYPE, (group,), (case.slot_nbytes,))
        identity = Identity(1, "bench", "full", DTYPE, case.num_blocks * BLOCK_SIZE, self.keys.hash_key_id)
        self.node = Node(draw_id(), "source" if self.is_source else "destination", identity, self.geometry, self.keys)
        self.landing = LandingThreads(self.regions, [DTYPE], digests=self._digests, num_threads=LANDING_THREADS)
        self.sockets = Sockets(self.keys)

    def _key(self, number: int) -> AttemptKey:
        return AttemptKey(f"{number:032x}", 0)

    @property
    def window(self) -> int | None:
        """Of the model's layers, in tokens; None is full attention."""
        return None

    @property
    def first_needed(self) -> int:
        """The oldest block that a decode step still reads."""
        oldest = 0 if self.window is None else self.case.num_blocks * BLOCK_SIZE - self.window + 1
        return max(0, oldest) // BLOCK_SIZE

    def hashes(self, blocks: npt.NDArray[np.int64]) -> list[int]:
        return super().hashes(blocks[self.first_needed :])

    def _prompt(self) -> tuple[int, ...]:
        return tuple(range(self.case.num_blocks * BLOCK_SIZE))

    async def _close(self) -> None:
        self._running.cancel()
        await asyncio.wait({self._running})
        await self.landing.close()


class WorkerSource(WorkerSide):
    """A `SourceHost` whose prompt is computed before a FETCH."""

    def __init__(self, plane: str, *, digests: bool) -> None:
        super().__init__(True, plane, digests=digests)
        self.digest_s = 0.0

    async def open(self, case: Case, secret: bytes) -> dict[str, Any]:
        self._open(case, secret)
        self.server = ControlServer.bind("tcp://127.0.0.1:0", self.keys, self.sockets)
        self.planes = source_planes(
            (self.plane,), host="127.0.0.1", advertised_host="127.0.0.1", keys=self.keys, sockets=self.sockets
        )
        for plane in self.planes.values():
            await plane.start(self.regions)
        self.sending = SendingSide(self.node, self.server, self.planes, self)
        self._running = asyncio.create_task(self.sending.run())
        return {"endpoint": self.server.endpoint, "incarnation": self.node.incarnation}

    async def connect(self, other: dict[str, Any]) -> None:
        self._peer = other["incarnation"]

    async def prepare(self, number: int, mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> None:
        del theirs
        self._begin(number)
        sources = self._sources(mine)
        since = time.perf_counter()
        units: tuple[HashedUnit, ...] = await self.landing.digest_units(sources)
        self.digest_s = time.perf_counter() - since
        self.sending.feed(self.attempt, UnitsFinal(1, units))
        self.sending.feed(self.attempt, PromptComputed(1, FIRST_TOKEN))

    def _sources(self, blocks: npt.NDArray[np.int64]) -> list[SourceUnit]:
        return [SourceUnit(0, i, 0, slot, 0) for i, slot in enumerate(blocks.tolist())]

    def _begin(self, number: int) -> None:
        """The router dispatched the request."""
        self.attempt = key = self._key(number)
        pushes = {name: plane.sends_bytes for name, plane in self.planes.items()}
        sender = Sender(
            Ends(key.transfer_id, key.epoch, self.node.incarnation, self._peer),
            Offer(
                prompt=self._prompt(),
                geometry=self.geometry,
                unit_nbytes=(self.case.slot_nbytes,),
                planes=pushes,
                keys=self.keys,
                ttl_s=DEADLINE_S,
                part=Part.whole(self.geometry.groups),
            ),
            time.monotonic(),
        )
        self.released = asyncio.Event()
        self.sending.start(key, sender)

    async def move(self) -> int:
        await self.released.wait()
        return 0

    async def close(self) -> None:
        await self._close()
        for plane in self.planes.values():
            await plane.close()
        await self.server.close()
        self.sockets.close()
        self.pool.close()

    # --- SourceHost -------------------------------------------------------------------------------------------

    def pin(self, key: AttemptKey) -> None:
        self.sending.feed(key, Pinned(1))

    def release_source(self, key: AttemptKey, reason: str) -> None:
        self.released.set()

    def unregister(self, key: AttemptKey, units: Any) -> None:
        """Nothing is registered here."""


class WorkerDestination(WorkerSide):
    """A `LandingHost` that has reserved its slots before it asks."""

    def __init__(self, plane: str, *, digests: bool) -> None:
        super().__init__(False, plane, digests=digests)

    async def open(self, case: Case, secret: bytes) -> dict[str, Any]:
        self._open(case, secret)
        return {"incarnation": self.node.incarnation}

    async def connect(self, other: dict[str, Any]) -> None:
        self._peer = other["incarnation"]
        planes = landing_planes((self.plane,), keys=self.keys, sockets=self.sockets)
        self.receiving = ReceivingSide(self.node, planes, self.regions, (0,), self.landing, self.sockets, self)
        self._running = asyncio.create_task(self.receiving.run())
        await asyncio.sleep(0)
        self.receiving.set_peers([PeerTarget(self._peer, "source", other["endpoint"])])
        async with asyncio.timeout(DEADLINE_S):
            while not self.receiving.is_ready(self._peer):  # noqa: ASYNC110 - a link has no event for it
                await asyncio.sleep(0.01)

    async def prepare(self, number: int, mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> None:
        del theirs
        prompt = self._prompt()
        self._attempt = self._key(number)
        ids = {"transfer_id": self._attempt.transfer_id, "epoch": self._attempt.epoch}
        grant = ticket.mint(
            self.keys.ticket,
            **ids,  # type: ignore[arg-type]
            prefill=self._peer,
            decode=self.node.incarnation,
            prompt=prompt,
            ttl_s=DEADLINE_S,
        )
        self._receiver = Receiver(
            Ends(self._attempt.transfer_id, self._attempt.epoch, self.node.incarnation, self._peer),
            Order(
                ticket=grant,
                plane=self.plane,
                geometry=self.geometry,
                keys=self.keys,
                deadline_s=DEADLINE_S,
                part=Part.whole(self.geometry.groups),
            ),
            time.monotonic(),
        )
        first = self.first_needed
        self._slots = list(enumerate(mine.tolist()))[first:]
        self._reserved = Reserved((GroupRuns(0, ((first, self.case.num_blocks - first),)),), len(prompt))
        self._verdict: asyncio.Future[TransferRecord] = asyncio.get_running_loop().create_future()

    async def move(self) -> int:
        self.receiving.start(self._attempt, self._receiver, self._peer, [self._slots], self._reserved)
        return (await self._verdict).num_operations

    async def close(self) -> None:
        await self._close()
        self.sockets.close()
        self.pool.close()

    # --- LandingHost ------------------------------------------------------------------------------------------

    def decode(self, key: AttemptKey, verified: Verified, record: TransferRecord) -> None:
        self._verdict.set_result(record)

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        names: tuple[UnitName, ...] = failure.units[:3]
        self._verdict.set_exception(RuntimeError(f"the transfer failed: {failure.reason} {names}"))

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        self._verdict.set_exception(RuntimeError(f"the transfer ended: {reason}"))
