"""What a worker process is made of, whatever the registration: settings, model, pools, threads, sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout
from disagg.config.settings import Role, WorkerSettings
from disagg.engine.commands import EngineEvent
from disagg.engine.engine import Engine
from disagg.transceiver.memory.peer_cuts import PeerCuts
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.landing_threads import LANDING_THREADS, LandingThreads
from disagg.transceiver.wire.faults import PeerFaults
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.transceiver.wire.purposes import served_by
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.turns import TurnQueue
from disagg.worker.drain import Drain
from disagg.worker.metrics import WorkerMetrics
from disagg.worker.model_thread import ModelThread
from disagg.worker.taking_in import TakingIn
from disagg.worker.vitals import Vitals


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Made before the loop runs: everything that takes seconds or can be refused.

    `ready` is what the process announces once it is registered.
    """

    role: Role
    settings: WorkerSettings
    identity: Identity
    layout: CacheLayout
    cache: KVCache
    engine: Engine
    ready: dict[str, Any]
    num_saturated: Callable[[], int] = lambda: 0
    """Numbers that the model stored as the largest of the KV dtype, since start."""

    @property
    def worker_id(self) -> str:
        return self.settings.name(self.role)

    @property
    def hasher(self) -> BlockHasher | None:
        """What names this worker's blocks, where it reuses prefixes."""
        return self.cache.prefixes.hasher if self.cache.prefixes is not None else None

    @property
    def sends(self) -> tuple[str, ...]:
        """The purposes of which this worker is a source."""
        return self._served[0]

    @property
    def receives(self) -> tuple[str, ...]:
        """Those of which it is a sink."""
        return self._served[1]

    @property
    def _served(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        reuses_prefixes = self.cache.prefixes is not None and bool(self.layout.groups)
        return served_by(self.role, reuses_prefixes=reuses_prefixes)

    @property
    def geometry(self) -> Geometry:
        groups = tuple(
            GroupSemantics(g.window, g.num_sink_tokens, g.num_kv_heads, g.head_dim, g.layers)
            for g in self.layout.groups
        )
        kv_dtype = ",".join(sorted({group.dtype for group in self.layout.groups}))
        scales = tuple(group.scales for group in self.layout.groups)
        return Geometry(
            self.layout.block_size,
            kv_dtype,
            groups,
            self.layout.slot_nbytes,
            kv_scales=scales if any(scales) else (),
        )

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        """The pools as data planes see them: their host side."""
        sides = [pool.sides for pool in self.cache.pools]
        return tuple(PoolRegion(side.host.numpy(), side.generations, side.fd, side.slots_offset) for side in sides)


class WorkerParts:
    """The running process: `EngineParts` with its threads and sockets. Nothing here belongs to one registration."""

    def __init__(self, made: EngineParts, keys: ClusterKeys, announce: Callable[[dict[str, Any]], None]) -> None:
        self.made, self.keys = made, keys
        self.role, self.settings, self.layout = made.role, made.settings, made.layout
        self.regions = made.regions
        self.num_slots = tuple(pool.num_slots for pool in made.cache.pools)
        self.sockets = Sockets(keys)
        self.landing = LandingThreads(
            self.regions, [group.dtype for group in made.layout.groups], num_threads=LANDING_THREADS
        )
        self.cuts = PeerCuts(made.geometry, self.regions)
        self.metrics = WorkerMetrics([group.name for group in made.layout.groups])
        self.metrics.watch_saturation("computed", made.num_saturated)
        self.metrics.watch_saturation("sent", lambda: self.cuts.num_saturated)
        self.faults = PeerFaults()
        self.metrics.watch_faults(lambda: self.faults.count)
        self.events: TurnQueue[EngineEvent] = TurnQueue()
        self.model: ModelThread
        self.taking_in = TakingIn(made.cache, self.settings.device, lambda command: self.model.submit(command))
        self.vitals = Vitals(self.sockets, lambda: not self.model.is_dead)
        self.drain = Drain(made.settings.drain_timeout_s)
        self._announce = announce
        self._is_announced = False

    def take_events(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            self.events.put_nowait(event)

    def announce_ready(self) -> None:
        """Tell the parent process once; later registrations are not news to it."""
        if not self._is_announced:
            self._is_announced = True
            self._announce(self.made.ready)

    async def close(self) -> None:
        """Join the threads, then give sockets and pools back."""
        await asyncio.to_thread(self.taking_in.close)
        await self.model.close()
        await self.landing.close()
        self.sockets.close()
        self.made.cache.close()
