"""The router's records of workers that exist as records alone: registered, alive, and linked each to each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from disagg.cache.layout import CacheLayout
from disagg.router.registry import Registry
from disagg.simulate.worker import SimulatedWorker
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity


def incarnation_of(number: int) -> str:
    return f"{number:032x}"


def number_of(incarnation: str) -> int:
    return int(incarnation, 16)


def records_of(workers: Sequence[SimulatedWorker], layout: CacheLayout) -> Registry:
    """A registry in which every worker speaks always and every pair is ready."""
    registry, geometry = Registry(), geometry_of(layout)
    identity = Identity(1, "simulated", "full", "float32", 1 << 30, "simulated")
    for worker in workers:
        name = incarnation_of(worker.number)
        registry.register(
            Register(
                incarnation=name,
                worker_id=f"{worker.role}-{worker.number}",
                role=worker.role,
                identity=identity,
                geometry=geometry,
                planes=("shm",),
                peer_endpoint="tcp://127.0.0.1:1",
                pid=1,
                host="simulated",
                device="none",
                num_slots=(),
            ),
            0.0,
        )
    links = {worker.incarnation: "ready" for worker in registry}
    for worker in registry:
        worker.heard_at, worker.link_states = math.inf, links
    return registry


def geometry_of(layout: CacheLayout) -> Geometry:
    groups = tuple(
        GroupSemantics(group.window, group.num_sink_tokens, group.num_kv_heads, group.head_dim, group.layers)
        for group in layout.groups
    )
    sizes = tuple(layout.slot_nbytes[pool] for pool in layout.pool_of_group)
    dtype = layout.groups[0].dtype if layout.groups else "float32"
    return Geometry(layout.block_size, dtype, groups, sizes)
