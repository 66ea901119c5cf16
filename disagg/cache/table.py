"""A block table of one group: index = ordinal, value = slot or -1. What a new length and new holes change in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HOLE = -1
"""Table value of an ordinal that has no slot: stale, or never allocated."""

Table = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TableChange:
    """`table` as it will be once `missing` (ordinals) have slots; `dropped`: slots it lets go, deepest first.

    `num_stale`: how many of the dropped ones the first hole took; a shorter length or another hole took the others.
    """

    table: Table
    dropped: Table
    missing: NDArray[np.int64]
    num_stale: int


def change_table(table: Table, num_blocks: int, holes: Iterable[range]) -> TableChange:
    """The table with `num_blocks` ordinals, of which exactly those in `holes` (ascending) have no slot."""
    changed = np.full(num_blocks, HOLE, dtype=np.int32)
    changed[: len(table)] = table[:num_blocks]
    is_missing = changed < 0
    dropped = []
    for hole in holes:
        dropped.append(table[hole.start : min(hole.stop, num_blocks)])
        changed[hole.start : hole.stop] = HOLE
        is_missing[hole.start : hole.stop] = False
    gone = np.concatenate([*dropped, table[num_blocks:]])[::-1]
    num_stale = int((dropped[0] != HOLE).sum()) if dropped else 0
    return TableChange(changed, gone[gone != HOLE], np.flatnonzero(is_missing), num_stale)


def grow_table(table: Table, num_blocks: int, stale_before: range, stale: range) -> TableChange:
    """`change_table` of a table that holds all but `stale_before` and does not get shorter: most have little to do."""
    dropped = table[stale_before.stop : stale.stop]
    new = np.arange(len(table), num_blocks)
    missing = new if stale.stop <= len(table) else new[(new < stale.start) | (new >= stale.stop)]
    if not len(dropped) and not len(new):
        return TableChange(table, dropped, missing, 0)
    changed = np.empty(num_blocks, dtype=np.int32)  # written once: a table is as long as the prompt
    changed[: len(table)] = table
    changed[len(table) :] = HOLE
    changed[stale_before.stop : stale.stop] = HOLE
    return TableChange(changed, dropped[::-1], missing, len(dropped))


def only(table: Table, ordinals: NDArray[np.int64]) -> Table:
    """The table with the slots of these ordinals alone."""
    kept = np.full(len(table), HOLE, dtype=np.int32)
    kept[ordinals] = table[ordinals]
    return kept


def is_in(ordinals: NDArray[np.int64], ranges: Iterable[range]) -> NDArray[np.bool_]:
    """Which of the ordinals lie in one of the ranges."""
    found = np.zeros(len(ordinals), dtype=np.bool_)
    for some in ranges:
        found |= (ordinals >= some.start) & (ordinals < some.stop)
    return found
