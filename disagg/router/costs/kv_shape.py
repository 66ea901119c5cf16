"""How many bytes a prompt's KV has that a worker will read and does not hold, from its length alone.

The same count as `disagg.transceiver.layout.required` makes ordinal by ordinal, in closed form: a choice looks at
dozens of ways.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupShape:
    """One layer group. `window` None: full attention. `block_nbytes`: one block of all its layers."""

    window: int | None
    num_sink_tokens: int
    block_nbytes: int

    def num_blocks(self, num_tokens: int, num_held: int, block_size: int) -> int:
        """Blocks that queries from `num_tokens` on read, less those of a worker that could go on after `num_held`."""
        end = -(-num_tokens // block_size)
        held = num_held // block_size
        if self.window is None:
            return max(0, end - held)
        sink_end = -(-self.num_sink_tokens // block_size)
        # Between the sinks and here no block is read again; a window of one token reads none of those before it.
        first = max(sink_end, (num_tokens + 1 - self.window) // block_size) if self.window > 1 else end
        sinks = max(0, min(sink_end, end) - held)
        return sinks + max(0, end - max(first, held))


@dataclass(frozen=True, slots=True)
class KvShape:
    """How a worker's KV is cut: tokens per block, and its layer groups."""

    block_size: int
    groups: tuple[GroupShape, ...]

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size: {self.block_size}, expected at least 1")

    def moved_nbytes(self, num_tokens: int, num_held: int) -> int:
        """What goes to a worker that holds the first `num_held` tokens of these, in whole blocks."""
        return sum(
            group.num_blocks(num_tokens, num_held, self.block_size) * group.block_nbytes for group in self.groups
        )

    def usable(self, num_tokens: int, boundary: int) -> int:
        """Of the first `boundary` tokens those from which a prompt can go on: whole blocks, less its last token."""
        return min(boundary, num_tokens - 1) // self.block_size * self.block_size
