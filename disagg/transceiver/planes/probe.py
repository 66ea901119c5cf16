"""First contact: how fast is this plane, measured before a request depends on it.

A few slices of the source's zero slot into the receiver's trash slot, over the same path as KV: `fetch`, then `land`.
The first slice is not timed: it pays for growing windows and buffers. Slots are reused, so they stay in the CPU's
cache: on shared memory this is an upper bound, on a network it is the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final

from disagg.cache.pool import NULL_SLOT, TRASH_SLOT
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.planes.base import LandingPlane, SourcePlane
from disagg.transceiver.wire.errors import PeerLost, SourceChanged

PROBE_ID: Final = "probe"
"""No transfer has it: theirs are 32 hex digits."""

NUM_SLICES: Final = 4
SLICE_NBYTES: Final = 2 << 20
"""8 MiB in all (more where a slot is larger): 70 ms at 1 Gbit/s, off the path of every request."""

MAX_UNITS: Final = 256
"""Per slice. Slots smaller than 8 KiB exist in tests and in many ranks of a small model; 2 MiB of those would time
Python's work per unit, and hold up the loops of both ends."""

PROBE_S: Final = 2.0
"""A link that has not moved 8 MiB by then, 4 MB/s, is reported as 0.0 GB/s; it still works."""


def probe_units(pools: Sequence[PoolRegion]) -> list[SourceUnit]:
    """The sender's units of one slice. Reserved slots are never allocated, so their generation is always 0."""
    return [SourceUnit(0, ordinal, pool, NULL_SLOT, 0) for ordinal, pool in enumerate(_pools_of_units(pools))]


def probe_job(plane: LandingPlane, pools: Sequence[PoolRegion], number: int) -> LandingJob:
    """The receiver's job of one slice."""
    source = (NULL_SLOT, 0) if plane.reads_sources else (-1, -1)
    destinations = [
        Destination(0, ordinal, pool, TRASH_SLOT, *source) for ordinal, pool in enumerate(_pools_of_units(pools))
    ]
    return LandingJob("probe", PROBE_ID, 0, number, tuple(destinations))


async def measure(plane: LandingPlane, pools: Sequence[PoolRegion]) -> float:
    """GB/s of a connected plane, 0.0 when too slow to tell. Writes trash slots; raises as `fetch` and `land` do."""
    if not pools:
        return 0.0
    await plane.ask_probe()
    nbytes, since = 0, 0.0
    try:
        async with asyncio.timeout(PROBE_S):
            for number in range(NUM_SLICES):
                job = probe_job(plane, pools, number)
                await plane.fetch(job)
                landed = await asyncio.to_thread(plane.land, job)
                nbytes, since = (nbytes + landed, since) if since else (0, time.perf_counter())
    except TimeoutError:
        plane.discard(PROBE_ID, 0)
        return 0.0
    return nbytes / (time.perf_counter() - since) / 1e9


async def send_probe(plane: SourcePlane, peer: str, pools: Sequence[PoolRegion]) -> None:
    """What a byte-sending source answers to `ask_probe`. A receiver that left meanwhile is not our concern here."""
    with contextlib.suppress(PeerLost, SourceChanged):
        for number in range(NUM_SLICES if pools else 0):
            await plane.send(peer, PROBE_ID, 0, number, probe_units(pools))


def _pools_of_units(pools: Sequence[PoolRegion]) -> list[int]:
    """The pool of each unit of a probe slice: all of the pool with the largest slots."""
    sizes = [region.slots.shape[1] for region in pools]
    largest = max(sizes)
    return [sizes.index(largest)] * min(MAX_UNITS, max(1, SLICE_NBYTES // largest))
