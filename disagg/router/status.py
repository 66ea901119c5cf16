"""Workers as `GET /workers` shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from disagg.router.pairing import traits_difference
from disagg.router.registry import Worker
from disagg.transceiver.wire.messages.router import LinkStatus


def describe_worker(worker: Worker, fleet: Sequence[Worker], load: Mapping[str, int], now: float) -> dict[str, Any]:
    """One JSON object. `requests` are the router's own count, the rest is what the worker last said of itself."""
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
        "blocks": _describe_blocks(worker),
        "running": lease.num_running,
        "queued": lease.num_queued,
        "requests": load.get(worker.incarnation, 0),
        "links": [_describe_link(link) for link in lease.links],
        "incompatible": _describe_incompatible(worker, fleet),
    }


def _describe_blocks(worker: Worker) -> list[dict[str, int]]:
    used, free = worker.lease.blocks_used, worker.lease.blocks_free
    slots = worker.register.num_slots
    return [
        {"pool": i, "used": u, "free": f, "slots": s}
        for i, (u, f, s) in enumerate(zip(used, free, slots, strict=False))
    ]


def _describe_link(link: LinkStatus) -> dict[str, Any]:
    return {
        "worker": link.worker_id,
        "incarnation": link.incarnation,
        "plane": link.plane,
        "state": link.state,
        "gb_per_s": link.gb_per_s if math.isfinite(link.gb_per_s) else None,  # JSON has no NaN
        "detail": link.detail,
    }


def _describe_incompatible(worker: Worker, fleet: Sequence[Worker]) -> list[dict[str, str]]:
    """Workers of the opposite role that this one is never paired with, and the first field that differs."""
    found = []
    for other in fleet:
        if {worker.role, other.role} != {"prefill", "decode"}:
            continue
        prefill, decode = (worker, other) if worker.role == "prefill" else (other, worker)
        if difference := traits_difference(prefill.traits, decode.traits):
            ours, theirs = difference.ours, difference.theirs
            found.append({"worker": other.worker_id, "field": difference.field, "prefill": ours, "decode": theirs})
    return found
