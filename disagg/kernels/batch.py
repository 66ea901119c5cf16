"""What a step asks of paged attention: neutral to the device, built once per step and layer group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The slot that padding reads: always finite, never written. `disagg.cache.pool` reserves it under the same number.
NULL_SLOT = 0
# The slot that padding writes, never read. Reserved there too.
TRASH_SLOT = 1

Int64 = npt.NDArray[np.int64]


def first_seen(starts: Int64, window: int | None) -> Int64:
    """The first position in the window of queries at `starts`."""
    return np.zeros_like(starts) if window is None else np.maximum(starts - window + 1, 0)


def first_blocks(starts: Int64, block_size: int, window: int | None, num_sink_tokens: int) -> tuple[Int64, Int64]:
    """Of runs that start at `starts`: the window's first block, and how many sink blocks lie before it."""
    firsts = first_seen(starts, window) // block_size
    return firsts, np.minimum(-(-num_sink_tokens // block_size), firsts)


def num_seen(starts: Int64, window: int | None, num_sink_tokens: int) -> Int64:
    """Keys that queries at `starts` attend to: their windows', and the sink tokens before them."""
    firsts = first_seen(starts, window)
    return starts + 1 - firsts + np.minimum(firsts, num_sink_tokens)


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Consecutive queries of one sequence at positions `start` ... `start + num_queries - 1`.

    `table` is int32, index = ordinal, value = slot or -1. Every block that a query writes or attends to has a slot.
    """

    table: npt.NDArray[np.int32]
    start: int
    num_queries: int

    def __post_init__(self) -> None:
        assert self.start >= 0
        assert self.num_queries >= 0

    @property
    def end(self) -> int:
        return self.start + self.num_queries


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The queries of one step in flat order, and what its layer group lets them see.

    A query at p attends to keys in [p - window + 1, p] (window None: [0, p]) and to the `num_sink_tokens` leading
    positions.
    """

    runs: tuple[QueryRun, ...]
    block_size: int
    window: int | None
    num_sink_tokens: int

    @property
    def num_queries(self) -> int:
        return sum(run.num_queries for run in self.runs)

    def ordinals(self, run: QueryRun) -> Int64:
        """Blocks that some query of `run` attends to, ascending: the sink blocks, then the window."""
        end = -(-run.end // self.block_size)
        if self.window is None:
            return np.arange(end)
        firsts, sinks = self.first_ordinals(np.array([run.start]))
        return np.concatenate([np.arange(sinks[0]), np.arange(firsts[0], end)])

    def first_ordinals(self, starts: Int64) -> tuple[Int64, Int64]:
        """As the function `first_blocks`."""
        return first_blocks(starts, self.block_size, self.window, self.num_sink_tokens)

    def slots(self, run: QueryRun, ordinals: Int64) -> Int64:
        slots = run.table[ordinals].astype(np.int64)
        assert (slots > NULL_SLOT).all(), f"a query at {run.start} needs a block that has no slot"
        return slots

    def allowed(self, queries: Int64, keys: Int64) -> npt.NDArray[np.bool_]:
        """Which of `keys` (absolute positions) each of `queries` attends to; the arrays broadcast."""
        allowed = keys <= queries
        if self.window is not None:
            allowed &= (keys > queries - self.window) | (keys < self.num_sink_tokens)
        return allowed
