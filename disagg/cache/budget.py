"""How many slots each pool gets from one memory budget: by what a sequence really holds, not by its length.

A full group holds every block of a sequence, a windowed one only its window. N sequences of the maximum length need
    full:      N * ceil(L/T)
    windowed:  N * (floor((W+T-2)/T) + 1 + sinks) + ceil(B/T) + A      (capped by N * ceil(L/T))
slots, where B tokens are computed per step by at most A sequences that prefill (each may straddle one block more).
With scratch slots of L blocks the step takes at most  A * (floor((W+T-3)/T) + 1) + ceil(B/T/L) + A  of them instead:
blocks that were live when it began. Those live at its end, also of `reuse`, are no more than a sequence has in decode.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg.cache.admission import Peaks, group_peak_slots, peak_slots
from disagg.cache.errors import BudgetTooSmall
from disagg.cache.layout import CacheLayout
from disagg.cache.pool import NUM_RESERVED_SLOTS
from disagg.cache.scratch import num_scratch_slots

MAX_PREFILLS_PER_STEP = 8
"""A: more prefills than this in one step slow each other down and shorten no wait."""


def split_budget(
    layout: CacheLayout, *, nbytes: int, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
) -> tuple[int, ...]:
    """Slots per pool, the two reserved included, that together take at most `nbytes`.

    At least one sequence of `max_model_len` is seated, else BudgetTooSmall; at most `max_num_seqs` are: memory beyond
    that is left alone. What is left when as many are seated as fit brings every pool the same share of the way there,
    and what is too little for that goes to the pools of the smallest slots.
    """
    limits = (max_model_len, max_num_batched_tokens)
    least, most = _seat_one(layout, *limits), _seat(layout, max_num_seqs, *limits)
    if nbytes < (floor := _nbytes(layout, least)):
        raise BudgetTooSmall(_too_small(layout, nbytes, floor, *limits))
    count = num_seated(layout, nbytes, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens)
    base = _seat(layout, min(count, max_num_seqs), *limits) if count else least
    start, end = _nbytes(layout, base), _nbytes(layout, most)
    spare, range_ = min(nbytes, end) - start, max(1, end - start)
    slots = [low + (high - low) * spare // range_ for low, high in zip(base, most, strict=True)]
    left = start + spare - _nbytes(layout, slots)
    for pool in sorted(range(layout.num_pools), key=layout.slot_nbytes.__getitem__):
        extra = min(left // layout.slot_nbytes[pool], most[pool] - slots[pool])
        slots[pool] += extra
        left -= extra * layout.slot_nbytes[pool]
    return tuple(slot + NUM_RESERVED_SLOTS for slot in slots)


def num_seated(layout: CacheLayout, nbytes: int, *, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Sequences of `max_model_len` that `nbytes` hold at once, the pools sized for just so many; 0 without KV.

    `max_num_batched_tokens` 0 leaves the step peak out.
    """
    if not layout.num_pools:
        return 0
    low, high = 0, nbytes // sum(layout.slot_nbytes)  # a sequence holds at least one slot of every pool
    while low < high:
        middle = (low + high + 1) // 2
        if _nbytes(layout, _seat(layout, middle, max_model_len, max_num_batched_tokens)) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return low


def num_seated_by_length(layout: CacheLayout, nbytes: int, *, max_model_len: int) -> int:
    """Sequences that `nbytes` hold when every layer keeps every block, with no slot reserved and no step peak."""
    slots = sum(layout.slot_nbytes[pool] for pool in layout.pool_of_group)
    return nbytes // (layout.num_blocks(max_model_len) * slots) if slots else 0


def largest_model_len(layout: CacheLayout, nbytes: int, *, max_model_len: int, max_num_batched_tokens: int) -> int:
    """The longest sequence, up to `max_model_len`, that `nbytes` can seat; 0 when not even one token fits."""
    low, high = 0, max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        if _nbytes(layout, _seat_one(layout, middle, max_num_batched_tokens)) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return low


def _seat_one(layout: CacheLayout, max_model_len: int, max_num_batched_tokens: int) -> Peaks:
    step = min(max_model_len, max_num_batched_tokens)
    return peak_slots(layout, total_tokens=max_model_len, history=0, step_tokens=step)


def _seat(layout: CacheLayout, num_seqs: int, max_model_len: int, max_num_batched_tokens: int) -> Peaks:
    demand = [0] * layout.num_pools
    for number, pool in enumerate(layout.pool_of_group):
        whole = num_seqs * layout.num_blocks(max_model_len)
        decode = num_seqs * group_peak_slots(layout, number, max_model_len, 0, 1)
        step = _step_peak(layout, number, min(num_seqs, MAX_PREFILLS_PER_STEP), max_num_batched_tokens)
        demand[pool] += whole if layout.groups[number].window is None else min(decode + step, whole)
    return tuple(demand)


def _step_peak(layout: CacheLayout, number: int, num_prefills: int, max_num_batched_tokens: int) -> int:
    """Slots of a windowed group that a step's prefills hold beyond what the same sequences hold in decode."""
    if max_num_batched_tokens == 0:
        return 0
    group, size = layout.groups[number], layout.block_size
    plain = layout.num_blocks(max_num_batched_tokens) + num_prefills
    if group.window is None or not (pages := layout.scratch_pages(number)):
        return plain
    at_start = num_prefills * ((group.window + size - 3) // size + 1)
    return min(plain, at_start + num_scratch_slots(layout.num_blocks(max_num_batched_tokens), pages) + num_prefills)


def _nbytes(layout: CacheLayout, peaks: Sequence[int]) -> int:
    """Bytes of pools that hold `peaks` and the reserved slots."""
    return sum((n + NUM_RESERVED_SLOTS) * size for n, size in zip(peaks, layout.slot_nbytes, strict=True))


def _too_small(layout: CacheLayout, nbytes: int, floor: int, max_model_len: int, max_num_batched_tokens: int) -> str:
    fits = largest_model_len(layout, nbytes, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens)
    shorter = f", or `--max-model-len` of at most {fits}" if fits else ""
    return (
        f"`--kv-cache-memory`: {nbytes} bytes, but one sequence of {max_model_len} tokens needs {floor}; "
        f"give at least {floor}{shorter}"
    )
