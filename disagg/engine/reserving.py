"""Room for KV that another worker sends: which blocks it is to bring, and into which slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from disagg.cache.cache import KVCache
from disagg.cache.window import needed_ordinals
from disagg.engine.commands import ReservedEvent
from disagg.engine.sequence import Reservation


def reserve(cache: KVCache, reservation: Reservation) -> ReservedEvent:
    """Take what is cached of the tokens given, and slots for the rest, which were promised.

    History first: blocks that no query will read are never allocated.
    """
    assert reservation.cached is not None
    request = reservation.request
    held = cache.reserve(reservation.cached, request.known, capacity=request.num_known + 1)
    assert held is not None, f"{reservation.key}: a promised slot was not there"
    reservation.held = held
    return _await_rest(cache, reservation)


def extend(cache: KVCache, reservation: Reservation, output: tuple[int, ...]) -> ReservedEvent:
    """The answer is longer than when room was made for it: let go of what no query will read, add what is missing.

    Nothing has landed yet. To be called when the slots were promised.
    """
    assert reservation.cached is not None
    reservation.request = replace(reservation.request, emitted=output)
    count = reservation.request.num_known
    done = cache.resize(reservation.cached, capacity=count + 1, history=count)
    assert done, f"{reservation.key}: a promised slot was not there"
    return _await_rest(cache, reservation)


def _await_rest(cache: KVCache, reservation: Reservation) -> ReservedEvent:
    assert reservation.cached is not None
    layout, slots = cache.layout, []
    for group, table, have in zip(layout.groups, reservation.cached.tables, reservation.held, strict=True):
        count = reservation.request.num_known
        missing = np.setdiff1d(needed_ordinals(count, group.window, group.num_sink_tokens, layout.block_size), have)
        slots.append(tuple(zip(missing.tolist(), table[missing].tolist(), strict=True)))
    reservation.awaited = tuple(slots)
    return ReservedEvent(reservation.key, reservation.awaited)
