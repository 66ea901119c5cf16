"""The compact form of a plan: block lists and cached-prefix counts, as engines report them (protocol.md section 1).

An engine that keeps per-sequence lists instead of tables gives, per layer group, the resident suffix of [0, end) and
a count c_g of cached whole blocks. A *table* is the form everything is decided in: index = ordinal, entry = slot or -1,
length ceil(P/T). `disagg.transceiver.library.plan_copies.transfer_plan` pairs two of them by token position where both
hold a slot, for what the *logical* window needs: what is resident is not what is needed, since a sender may not have
evicted yet.

The offset of a list is inferred from its length, which is right only when what it lacks is exactly a prefix. Sinks
break that (the hole lies behind them): a list without an anchor is legal only when S = 0, a group with sinks gives
segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]
HOLE = -1


def num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def token_offset(num_listed: int, end: int, block_size: int) -> int:
    """First token that a list of `num_listed` blocks covers when it is the resident suffix of [0, end)."""
    if num_listed > num_blocks(end, block_size):
        raise ValueError(f"{num_listed} blocks listed for {end} tokens, at most {num_blocks(end, block_size)}")
    return (num_blocks(end, block_size) - num_listed) * block_size


def table_of_segments(segments: Sequence[tuple[int, Sequence[int]]], prompt_len: int, block_size: int) -> Table:
    """A table from anchored lists (first ordinal, slots). Slots beyond the prompt (a speculative tail) are cut."""
    table = np.full(num_blocks(prompt_len, block_size), HOLE, dtype=np.int64)
    for first, slots in segments:
        kept = slots[: max(0, len(table) - first)]
        table[first : first + len(kept)] = kept
    return table


def table_of_suffix(
    slots: Sequence[int], *, prompt_len: int, block_size: int, num_sink_tokens: int = 0, end: int | None = None
) -> Table:
    """A table from a list without an anchor: the resident suffix of [0, end); `end` is P plus speculative tokens.

    A list longer than [0, end) starts at ordinal 0 and has a tail to cut. Raises `ValueError` for a group with sinks.
    """
    if num_sink_tokens:
        raise ValueError(f"a block list of a group with {num_sink_tokens} sink tokens needs an anchor")
    last = num_blocks(prompt_len if end is None else end, block_size)
    return table_of_segments([(max(0, last - len(slots)), slots)], prompt_len, block_size)


def cached_blocks(num_cached_tokens: int, block_size: int) -> int:
    """c_g of `num_cached_tokens`, the same for every group: whole blocks only, so a partly cached one is sent again."""
    return max(0, num_cached_tokens // block_size)


def cached_prefix(held: NDArray[np.int64], needed: NDArray[np.int64]) -> int | None:
    """c_g, the ordinal before which cached blocks end, or None when `held` is no prefix of `needed`."""
    count = len(held)
    if count > len(needed) or not np.array_equal(np.sort(held), needed[:count]):
        return None
    return int(needed[count - 1]) + 1 if count else 0


def final_span(start: int, end: int, prompt_len: int, num_reused: int, block_size: int) -> range:
    """Ordinals that become final when the prompt's tokens [start, end) have been computed; every block exactly once.

    The reused prefix rides in the first computed chunk (`start == num_reused`); a partial block waits for the chunk
    that fills it or ends the prompt. Raises `ValueError` for a chunk that ends before it starts; it may be empty.
    """
    if start > end:
        raise ValueError(f"a chunk of tokens [{start}, {end}) ends before it starts")
    first = 0 if start == num_reused else start // block_size
    last = num_blocks(end, block_size) if end >= prompt_len else end // block_size
    return range(first, max(first, last))
