"""What must move: the ordinals of each layer group that decode will read and does not hold (protocol.md section 1).

    need_g     = blocks holding a token t < P that some query at a position >= P attends:
                 t >= P-W+1, or t < S, or every t when the group is full attention
    required_g = need_g minus the ordinals the receiver holds complete

Pure and in whole blocks: a partial last block counts whole. Ordinals travel as ascending (first, count) runs, kept
apart by at least one ordinal, so that one set has one form and can be compared as it stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from disagg.cache.window import Attends
from disagg.transceiver.layout.cut import required_ordinals
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.values import GroupRuns, Run

Held = Sequence[Collection[int]]
"""Per group, the ordinals that the receiver holds; empty when it holds nothing."""


def needed_units(groups: Sequence[Attends], prompt_len: int, block_size: int) -> tuple[GroupRuns, ...]:
    """`need_g` of every group, in group order."""
    return required_units(groups, prompt_len, block_size, ())


def required_units(
    groups: Sequence[Attends], prompt_len: int, block_size: int, held: Held, held_block_size: int = 0
) -> tuple[GroupRuns, ...]:
    """`required_g`: entry g is group g's, with no runs when nothing of it must move. Any subset may be held.

    `held` in blocks of `held_block_size`, which `block_size` divides; 0 = in blocks of `block_size`.
    """
    return tuple(
        GroupRuns(
            number,
            runs_of(required_ordinals(group, prompt_len, block_size, held[number] if held else (), held_block_size)),
        )
        for number, group in enumerate(groups)
    )


def runs_of(ordinals: NDArray[np.int64]) -> tuple[Run, ...]:
    """Ascending, distinct ordinals as runs. O(n) in numpy."""
    if len(ordinals) == 0:
        return ()
    breaks = np.flatnonzero(np.diff(ordinals) != 1) + 1
    starts = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([starts, [len(ordinals)]]))
    return tuple(zip(ordinals[starts].tolist(), counts.tolist(), strict=True))


def moved_nbytes(required: Iterable[GroupRuns], unit_nbytes: Sequence[int] | Mapping[int, int]) -> int:
    """The minimum on the wire: required units x their group's slot bytes."""
    return sum(count * unit_nbytes[group.group] for group in required for _, count in group.runs)


def full_copy_blocks(prompt_len: int, block_size: int) -> int:
    """Blocks per group that a transfer without windows or reuse would move: ceil(P/T)."""
    return -(-prompt_len // block_size)


def full_copy_nbytes(prompt_len: int, block_size: int, unit_nbytes: Sequence[int]) -> int:
    """Bytes of every block of the prompt in every group."""
    return full_copy_blocks(prompt_len, block_size) * sum(unit_nbytes)


def check_required(required: Sequence[GroupRuns], need: Sequence[GroupRuns]) -> None:
    """Raises `RemoteProtocolError` unless a peer's `required` is well formed and within `need`, without expanding it.

    Ascending groups, runs ascending and apart: one set has one form, and no run can be too long to enumerate.
    """
    last_group = -1
    for entry in required:
        if not last_group < entry.group < len(need):
            raise RemoteProtocolError(f"group {entry.group}: expected ascending numbers below {len(need)}")
        last_group = entry.group
        _check_runs(entry, need[entry.group].runs)


def _check_runs(entry: GroupRuns, need: tuple[Run, ...]) -> None:
    previous_end = -1  # touching runs are one run: the next may start after previous_end at the earliest
    for first, count in entry.runs:
        if first <= previous_end or count < 1:
            raise RemoteProtocolError(
                f"group {entry.group}: run {(first, count)} is empty, or not after {previous_end}"
            )
        if not any(start <= first and first + count <= start + length for start, length in need):
            raise RemoteProtocolError(f"group {entry.group}: run {(first, count)} is outside what is needed: {need}")
        previous_end = first + count
