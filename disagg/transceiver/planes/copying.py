"""Copies of slots, as few as adjacency allows: one operation from Python costs as much as copying tens of kilobytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from disagg.transceiver.errors import RemoteProtocolError, SourceChanged
from disagg.transceiver.planes.base import Bytes, PoolRegion

Ints = npt.NDArray[np.int64]


def ints(values: Sequence[int]) -> Ints:
    """int64 `[len(values)]`. Raises `RemoteProtocolError` for a number no slot or generation has."""
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as exc:
        raise RemoteProtocolError("a slot or generation is out of range") from exc


def adjacent(pools: Ints, *slots: Ints) -> Iterator[tuple[int, int]]:
    """Cut units 0..n into (start, stop) runs in which the pool stays and each column of `slots` counts up by one."""
    if len(pools) == 0:
        return
    breaks = np.diff(pools) != 0
    for column in slots:
        breaks |= np.diff(column) != 1
    cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pools)]
    yield from itertools.pairwise(cuts)


def copy_rows(destination: Bytes, source: Bytes) -> None:
    """Copy equal shapes `[num_slots, slot_nbytes]`. One memcpy, which numpy does without the GIL."""
    np.copyto(destination, source)


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
