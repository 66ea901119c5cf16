"""Which blocks of a sequence some query can still attend to. Pure arithmetic; the tests brute-force every formula.

T = block size, h = tokens whose KV is computed (the next query is at position h), W = window counting the query itself,
S = sink tokens. A query at p attends to keys in [p-W+1, p] and to the S sinks; W = None is full attention.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Attends(Protocol):
    """What formulas read of a layer group: `disagg.cache.layout.LayerGroup` has it, and the wire's `GroupSemantics`."""

    @property
    def window(self) -> int | None: ...
    @property
    def num_sink_tokens(self) -> int: ...


def sink_blocks(num_sink_tokens: int, block_size: int) -> int:
    """ceil(S/T): blocks at the front that the sinks keep alive."""
    return -(-num_sink_tokens // block_size)


def stale_range(history: int, window: int | None, num_sink_tokens: int, block_size: int) -> range:
    """Ordinals that no query at position >= `history` attends: [sinks, max(sinks, floor((h+1-W)/T))); empty when full.

    May count as many blocks as exist beyond the sinks; callers clip it to the blocks they hold.
    """
    if window is None:
        return range(0)
    first = sink_blocks(num_sink_tokens, block_size)
    return range(first, max(first, (history + 1 - window) // block_size))


def received_whole(prompt_len: int, window: int | None, num_sink_tokens: int, block_size: int) -> tuple[range, range]:
    """Ordinals before and behind those that are stale after the prompt, all of whose tokens a transfer brings.

    A sender of smaller blocks leaves tokens out where some of a block are stale, and where the prompt ends.
    """
    num_whole = prompt_len // block_size
    stale = stale_range(prompt_len, window, num_sink_tokens, 1)
    if not stale:
        return range(num_whole), range(0)
    return range(min(stale.start // block_size, num_whole)), range(-(-stale.stop // block_size), num_whole)


def num_live(capacity: int, history: int, window: int | None, num_sink_tokens: int, block_size: int) -> int:
    """Blocks of [0, ceil(capacity/T)) that are not stale at `history`."""
    num_blocks = -(-capacity // block_size)
    stale = stale_range(history, window, num_sink_tokens, block_size)
    return num_blocks - len(range(min(stale.start, num_blocks), min(stale.stop, num_blocks)))


def live_slots_bound(window: int, num_sink_tokens: int, block_size: int, step_tokens: int = 1) -> int:
    """Most blocks of one windowed group that are live during a step of `step_tokens` tokens, over all alignments.

    floor((W+n+T-3)/T) + 1 + sinks: the oldest key of the step's first query and the last query are W+n-2 positions
    apart, and a span of that length touches at most so many blocks.
    """
    spanned = (window + step_tokens + block_size - 3) // block_size + 1
    return spanned + sink_blocks(num_sink_tokens, block_size)


def needed_ordinals(prompt_len: int, window: int | None, num_sink_tokens: int, block_size: int) -> NDArray[np.int64]:
    """Ordinals, ascending, that hold a token t < P which a query at a position >= P attends (protocol: `need_g`).

    t >= P-W+1, or t < S, or every t when attention is full. Shape [n], int64. Empty for W = 1 without sinks.
    """
    num_blocks = -(-prompt_len // block_size)
    if window is None:
        return np.arange(num_blocks, dtype=np.int64)
    sinks = sink_blocks(min(num_sink_tokens, prompt_len), block_size)
    oldest = max(0, prompt_len - window + 1)
    first = max(sinks, oldest // block_size) if oldest < prompt_len else num_blocks
    return np.concatenate([np.arange(sinks, dtype=np.int64), np.arange(first, num_blocks, dtype=np.int64)])
