"""Copies of slots, as few as adjacency allows: one operation from Python costs as much as copying tens of kilobytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disagg.kernels import native
from disagg.transceiver.layout.runs import Ints, adjacent
from disagg.transceiver.memory.regions import Bytes, PoolRegion
from disagg.transceiver.wire.errors import RemoteProtocolError, SourceChanged


def copy_rows(destination: Bytes, source: Bytes) -> None:
    """Copy equal shapes `[num_slots, slot_nbytes]`. One memcpy, which numpy does without the GIL."""
    np.copyto(destination, source)


def addresses(region: PoolRegion, slots: Ints) -> native.Addresses:
    """Where these slots of a pool begin in this process, uint64 `[len(slots)]`."""
    first = region.slots.ctypes.data
    return (first + slots * region.slots.strides[0]).astype(np.uint64)


def copy_slots(
    to: Sequence[PoolRegion], source: Sequence[PoolRegion], pools: Ints, slots: Ints, source_slots: Ints
) -> None:
    """Copy each unit from `source_slots` to `slots` of its pool: runs that are adjacent on both sides at once.

    Uses non-temporal stores where the compiled helper is: the model reads these bytes only much later.
    """
    runs = list(adjacent(pools, source_slots, slots))
    starts = np.array([start for start, _ in runs], dtype=np.int64)
    counts = np.array([stop - start for start, stop in runs], dtype=np.uint64)
    if not native.is_loaded():
        for start, stop in runs:
            target, first, pool = int(slots[start]), int(source_slots[start]), int(pools[start])
            count = stop - start
            copy_rows(to[pool].slots[target : target + count], source[pool].slots[first : first + count])
        return
    for pool in np.unique(pools).tolist():
        chosen = starts[pools[starts] == pool]
        nbytes = counts[pools[starts] == pool] * np.uint64(to[pool].slots.shape[1])
        native.copy(addresses(to[pool], slots[chosen]), addresses(source[pool], source_slots[chosen]), nbytes)


def check_generations(regions: Sequence[PoolRegion], pools: Ints, slots: Ints, planned: Ints) -> None:
    """Raise `SourceChanged` unless every source slot still has its planned generation.

    An early and cheap detector, no proof: nothing here orders these reads against the owner's writes on every CPU.
    Correctness rests on the digest of the destination.
    """
    for pool, region in enumerate(regions):
        chosen = pools == pool
        if not chosen.any():
            continue
        if not np.array_equal(region.generations[slots[chosen]], planned[chosen].astype(np.uint64)):
            raise SourceChanged("a source slot was given to another sequence before its bytes were copied")


def check_slots(regions: Sequence[PoolRegion], pools: Ints, slots: Ints) -> None:
    """Raise `RemoteProtocolError` when a slot named by a peer lies outside its pool."""
    for pool, region in enumerate(regions):
        chosen = slots[pools == pool]
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(region.slots)):
            raise RemoteProtocolError(f"the peer named a slot outside pool {pool}, which has {len(region.slots)} slots")
