"""What a worker's settings leave for kept prefixes, in words: for `up`, `plan` and the worker's log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from disagg.cache.budget import split_budget
from disagg.cache.errors import BudgetTooSmall
from disagg.cache.layout import CacheLayout
from disagg.cache.reuse_room import ReuseRoom, reuse_room

UNBOUNDED_NBYTES = 1 << 62
"""More than any machine has, so that only `--max-num-seqs` decides the size of a pool."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What decides the sizes of a worker's pools. `step_tokens`: the most that one sequence adds in a step here."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_tokens: int

    def slots(self, layout: CacheLayout, nbytes: int, *, max_num_seqs: int | None = None) -> tuple[int, ...]:
        return split_budget(
            layout,
            nbytes=nbytes,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs or self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
        )

    def room(self, layout: CacheLayout, num_slots: Sequence[int]) -> tuple[ReuseRoom, ...]:
        return reuse_room(layout, num_slots, max_model_len=self.max_model_len, step_tokens=self.step_tokens)


def room_in_words(rooms: Sequence[ReuseRoom]) -> str:
    """`353 of 358 blocks of window-64, 16126 of 16382 of full`."""
    parts = [f"{room.left} of {room.usable} blocks of {' + '.join(room.groups)}" for room in rooms]
    return ", ".join(parts) or "no blocks"


def advice(layout: CacheLayout, size: CacheSize, nbytes: int) -> str | None:
    """One sentence when a pool keeps no prefix beside one running sequence: why, and the flags to change."""
    rooms = size.room(layout, size.slots(layout, nbytes))
    short = [room for room in rooms if not room.keeps_a_prefix]
    if not short:
        return None
    why = "; ".join(
        f"{' + '.join(room.groups)} has {room.usable} blocks, of which a sequence of {size.max_model_len} tokens takes "
        f"up to {min(room.running, room.usable)}, and a prefix needs {room.prefix}"
        for room in short
    )
    return f"beside one running sequence no prefix is kept for reuse: {why}; {_remedy(layout, size, nbytes)}"


def _remedy(layout: CacheLayout, size: CacheSize, nbytes: int) -> str:
    """The smallest `--max-num-seqs` with room, and the memory that it takes."""
    for num_seqs in count(size.max_num_seqs):  # ends: every further sequence adds a block to every pool
        if _has_room(layout, size, num_seqs, UNBOUNDED_NBYTES):
            break
    enough = _nbytes(layout, size.slots(layout, UNBOUNDED_NBYTES, max_num_seqs=num_seqs))
    needed = _least_nbytes(layout, size, num_seqs, enough)
    asked = [f"`--max-num-seqs` {num_seqs} or more"] if num_seqs > size.max_num_seqs else []
    asked += [f"`--kv-cache-memory` of at least {needed} bytes per worker"] if needed > nbytes else []
    return "give " + " and ".join(asked)


def _least_nbytes(layout: CacheLayout, size: CacheSize, num_seqs: int, enough: int) -> int:
    """The least memory, up to `enough`, with room for a prefix in every pool made for so many sequences."""
    low, high = 0, enough
    while low < high:
        middle = (low + high) // 2
        if _has_room(layout, size, num_seqs, middle):
            high = middle
        else:
            low = middle + 1
    return high


def _has_room(layout: CacheLayout, size: CacheSize, num_seqs: int, nbytes: int) -> bool:
    try:
        num_slots = size.slots(layout, nbytes, max_num_seqs=num_seqs)
    except BudgetTooSmall:
        return False
    return all(room.keeps_a_prefix for room in size.room(layout, num_slots))


def _nbytes(layout: CacheLayout, num_slots: Sequence[int]) -> int:
    return sum(slots * nbytes for slots, nbytes in zip(num_slots, layout.slot_nbytes, strict=True))
