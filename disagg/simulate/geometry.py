"""Sizes of a model's KV: which blocks of a trace a layer group still needs, and the bytes that a handoff moves. Pure.

A trace names blocks of `unit` tokens; a cache has blocks of T tokens, of which a whole number makes a unit. Reuse is
counted in units, bytes in blocks. Both follow `disagg.cache.window`, in ranges instead of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg.cache.admission import Peaks, peak_slots
from disagg.cache.layout import CacheLayout
from disagg.cache.window import sink_blocks, stale_range

Runs = tuple[tuple[int, int], ...]
"""[first, end) of ordinals, ascending."""


@dataclass(frozen=True)
class KvGeometry:
    """A layout, seen by a trace of blocks of `unit` tokens. Raises ValueError where that is no multiple of its own."""

    layout: CacheLayout
    unit: int
    _known: dict[tuple[int, int, int], Peaks] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit % self.layout.block_size:
            raise ValueError(
                f"the trace has blocks of {self.unit} tokens and the cache of {self.layout.block_size}: expected a "
                "multiple, choose another `--block-size`"
            )

    @property
    def blocks_per_unit(self) -> int:
        return self.unit // self.layout.block_size

    def needed(self, group: int, num_tokens: int, size: int) -> Runs:
        """Blocks of `size` tokens, the last one maybe in part, that queries behind so many tokens read."""
        one, count = self.layout.groups[group], -(-num_tokens // size)
        if one.window is None:
            return ((0, count),)
        stale = stale_range(num_tokens, one.window, one.num_sink_tokens, size)
        front = min(sink_blocks(min(one.num_sink_tokens, num_tokens), size), count)
        oldest = min(max(front, stale.stop), count)
        if one.window == 1:  # the query itself is all that it reads beside the sinks
            oldest = count
        return _joined((0, front), (oldest, count))

    def moved(self, num_tokens: int, held: Sequence[Runs], from_token: int = 0) -> tuple[int, ...]:
        """Per group, bytes that a prompt's handoff moves: blocks needed less those in the units that are held.

        Of these, only blocks from the one of `from_token` on.
        """
        return tuple(self._moved(group, num_tokens, runs, from_token) for group, runs in enumerate(held))

    def _moved(self, group: int, num_tokens: int, held: Runs, from_token: int) -> int:
        size, ratio = self.layout.block_size, self.blocks_per_unit
        start = from_token // size
        count = 0
        for first, end in self.needed(group, num_tokens, size):
            low = max(first, start)
            if low < end:
                count += end - low - sum(_shared(low, end, f * ratio, e * ratio) for f, e in held)
        return count * self.layout.slot_nbytes[self.layout.pool_of_group[group]]

    def peaks(self, total_tokens: int, history: int, step_tokens: int) -> Peaks:
        """Slots per pool that a sequence holds at most; see `peak_slots`."""
        step = 1 if history else min(step_tokens, total_tokens)
        if (peaks := self._known.get((total_tokens, history, step))) is None:
            peaks = peak_slots(self.layout, total_tokens=total_tokens, history=history, step_tokens=step)
            self._known[total_tokens, history, step] = peaks
        return peaks


def runs_in(found: Sequence[int]) -> Runs:
    """Ascending ordinals as runs."""
    runs: list[tuple[int, int]] = []
    for ordinal in found:
        if runs and runs[-1][1] == ordinal:
            runs[-1] = runs[-1][0], ordinal + 1
        else:
            runs.append((ordinal, ordinal + 1))
    return tuple(runs)


def _joined(front: tuple[int, int], back: tuple[int, int]) -> Runs:
    if front[1] >= back[0]:
        front, back = (0, max(front[1], back[1])), (0, 0)
    return tuple(run for run in (front, back) if run[0] < run[1])


def _shared(low: int, end: int, first: int, last: int) -> int:
    return max(0, min(end, last) - max(low, first))
