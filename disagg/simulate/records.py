"""The router's records of workers that exist as records alone: registered, alive, and linked each to each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from disagg.cache.layout import CacheLayout
from disagg.router.pairing import PairTraits
from disagg.router.registry import Registry
from disagg.simulate.handoff import Ground
from disagg.simulate.worker import SimulatedWorker
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import Lease, LinkStatus, Register
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.transceiver.wire.purposes import RECEIVES, SENDS


def incarnation_of(number: int) -> str:
    return f"{number:032x}"


def number_of(incarnation: str) -> int:
    return int(incarnation, 16)


def records_of(workers: Sequence[SimulatedWorker], ground: Ground) -> Registry:
    """A registry in which every worker speaks always and every pair is ready."""
    registry, geometry = Registry(), geometry_of(ground.geometry.layout)
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
                sends=SENDS[worker.role],
                receives=RECEIVES[worker.role],
                tells_blocks=True,
            ),
            0.0,
        )
    rates, per_s = ground.rates, ground.rates.link_bytes_per_s / 1e9
    latency_s = rates.link_latency_s + 2 * rates.handoff_cpu_s
    links = {
        w.incarnation: LinkStatus(w.incarnation, w.worker_id, "shm", "ready", per_s, "", latency_s) for w in registry
    }
    measured = MeasuredRates(rates.prefill_tokens_per_s, rates.empty_step_s, rates.decode_step_s.points)
    traits = PairTraits(next(iter(registry)).register)  # equal for all: one object is compared faster than many
    for record in registry:
        record.traits = traits
        record.heard_at, record.link_reports = math.inf, links
        record.lease = Lease(record.incarnation, "", rates=measured)
    return registry


def geometry_of(layout: CacheLayout) -> Geometry:
    groups = tuple(
        GroupSemantics(group.window, group.num_sink_tokens, group.num_kv_heads, group.head_dim, group.layers)
        for group in layout.groups
    )
    sizes = tuple(layout.slot_nbytes[pool] for pool in layout.pool_of_group)
    dtype = layout.groups[0].dtype if layout.groups else "float32"
    return Geometry(layout.block_size, dtype, groups, sizes)
