"""Workers as `GET /workers` shows them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from disagg.router.pairing import PairTraits, traits_difference
from disagg.router.registry import Worker
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import LinkStatus


def describe_workers(fleet: Sequence[Worker], load: Mapping[str, int], now: float) -> list[dict[str, Any]]:
    """One JSON object each. `requests` are the router's own count, the rest is what the worker last said of itself."""
    kinds = defaultdict[str, dict[PairTraits, list[Worker]]](dict)
    for worker in fleet:
        kinds[worker.role].setdefault(worker.traits, []).append(worker)
    return [_describe_worker(worker, kinds, load, now) for worker in fleet]


Kinds = Mapping[str, Mapping[PairTraits, Sequence[Worker]]]
"""By role, then by what decides about pairs: a fleet has a handful."""


def _describe_worker(worker: Worker, kinds: Kinds, load: Mapping[str, int], now: float) -> dict[str, Any]:
    register, lease = worker.register, worker.lease
    return {
        "id": worker.worker_id,
        "role": worker.role,
        "pid": register.pid,
        "host": register.host,
        "device": register.device,
        "endpoint": register.peer_endpoint,
        "incarnation": worker.incarnation,
        "state": worker.state(now).value,
        "lease_age_s": round(now - worker.heard_at, 3),
        "identity": asdict(register.identity),
        "geometry": asdict(register.geometry),
        "planes": list(register.planes),
        "sends": list(worker.sends),
        "receives": list(worker.receives),
        "blocks": _describe_blocks(worker),
        "running": lease.num_running,
        "queued": lease.num_queued,
        "requests": load.get(worker.incarnation, 0),
        "rates": _describe_rates(worker),
        "links": [_describe_link(link) for link in lease.links or ()],
        "incompatible": _describe_incompatible(worker, kinds),
    }


def _describe_blocks(worker: Worker) -> list[dict[str, int]]:
    used, free = worker.lease.blocks_used, worker.lease.blocks_free
    slots = worker.register.num_slots
    return [
        {"pool": i, "used": u, "free": f, "slots": s}
        for i, (u, f, s) in enumerate(zip(used, free, slots, strict=False))
    ]


def _describe_rates(worker: Worker) -> dict[str, Any]:
    """What it measured of its own steps; null where it has computed nothing yet."""
    rates = worker.lease.rates or MeasuredRates()
    return {
        "prefill_tokens_per_s": rates.prefill_tokens_per_s or None,
        "prompt_step_s": rates.prompt_step_s if rates.prefill_tokens_per_s else None,
        "step_s": [{"answers": count, "seconds": seconds} for count, seconds in rates.step_s],
    }


def _describe_link(link: LinkStatus) -> dict[str, Any]:
    return {
        "worker": link.worker_id,
        "incarnation": link.incarnation,
        "plane": link.plane,
        "state": link.state,
        "gb_per_s": link.gb_per_s if math.isfinite(link.gb_per_s) else None,  # JSON has no NaN
        "latency_s": link.latency_s,
        "detail": link.detail,
    }


def _describe_incompatible(worker: Worker, kinds: Kinds) -> list[dict[str, str]]:
    """Workers of the opposite role that this one is never paired with, and the first field that differs."""
    found = []
    opposite = {"prefill": "decode", "decode": "prefill"}.get(worker.role, "")
    for traits, others in kinds.get(opposite, {}).items():
        prefill, decode = (worker.traits, traits) if worker.role == "prefill" else (traits, worker.traits)
        if difference := traits_difference(prefill, decode):
            told = {"field": difference.field, "prefill": difference.ours, "decode": difference.theirs}
            found += [{"worker": other.worker_id} | told for other in others]
    return found
