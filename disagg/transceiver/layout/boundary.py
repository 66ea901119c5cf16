"""Up to where a prompt's cached blocks can be fetched: what both ends hold together decides (`protocol.md` section 9).

A boundary is a number of tokens that whole blocks of both sizes fill. Units are blocks of the finer size. Pure; the
tests walk tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from disagg.cache.reuse import usable_lengths
from disagg.cache.window import Attends
from disagg.transceiver.layout.cut import finer
from disagg.transceiver.layout.required import Held, required_units
from disagg.transceiver.wire.messages.values import GroupRuns

Resident = NDArray[np.bool_]


def common_boundary(
    groups: Sequence[Attends],
    limit: int,
    resident: Sequence[Resident],
    block_size: int,
    held: Held,
    held_block_size: int,
) -> int:
    """The largest boundary up to `limit` from which a prompt goes on with what both ends hold; 0 if nothing moves then.

    `resident[g]`: bool [n], whether the source has the block of each of the n ordinals that it knows, in blocks of
    `block_size`. `held[g]`: ordinals of the sink, in blocks of `held_block_size`. One size divides the other.
    """
    unit, coarser = min(block_size, held_block_size), max(block_size, held_block_size)
    usable = np.ones(limit // unit + 1, dtype=np.bool_)
    for number, group in enumerate(groups):
        ours = np.repeat(resident[number], block_size // unit)
        together = _marked(held[number], held_block_size // unit, len(usable) - 1)
        together[: len(ours)] |= ours[: len(together)]
        usable &= usable_lengths(together, group, unit)
    boundary = int(np.flatnonzero(usable[:: coarser // unit])[-1]) * coarser  # 0 is always usable
    return boundary if any(entry.runs for entry in missing_at(groups, boundary, unit, held, held_block_size)) else 0


def missing_at(
    groups: Sequence[Attends], boundary: int, unit: int, held: Held, held_block_size: int
) -> tuple[GroupRuns, ...]:
    """What must move, in units: needed from `boundary` tokens on, less what the sink holds. Groups with such units."""
    every = required_units(groups, boundary, unit, held, held_block_size)
    return tuple(entry for entry in every if entry.runs)


def ordinals_of(runs: Sequence[GroupRuns], num_groups: int) -> tuple[NDArray[np.int64], ...]:
    """Per group, the ordinals that runs name; int64, ascending."""
    found = [np.empty(0, dtype=np.int64) for _ in range(num_groups)]
    for entry in runs:
        found[entry.group] = np.concatenate([np.arange(first, first + count) for first, count in entry.runs])
    return tuple(found)


def _marked(ordinals: Collection[int], units_per_block: int, num_units: int) -> Resident:
    """bool [num_units]: which units these blocks hold."""
    marked = np.zeros(num_units, dtype=np.bool_)
    units = finer(np.fromiter(ordinals, dtype=np.int64), units_per_block, 1)
    marked[units[units < num_units]] = True
    return marked
