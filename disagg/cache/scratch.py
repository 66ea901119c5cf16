"""Scratch: windowed blocks that are stale when their prefill step ends live side by side in one slot while it runs.

Such a block's KV is read only while its own layer runs. A slot of a group with L layers has L pages, one per layer;
taken as scratch it holds L *blocks* of whichever layer runs: block q of the step's scratch blocks lies in slot q // L,
page q % L, for every layer alike. The next layer writes over it, so nothing of it outlives the step, and a layer whose
KV another one reads must be the last to write (`CacheLayout.scratch_pages`). A page belongs to one block whatever the
layers' sizes: groups of equal slot bytes share a pool, but a slot is cut by its own group alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disagg.cache.window import stale_range


@dataclass(frozen=True, slots=True)
class Scratch:
    """The scratch blocks of one sequence and group in one step: ordinals [first, first + num_blocks) in `slots`."""

    first: int
    num_blocks: int
    slots: tuple[int, ...]

    def pages(self, pages_per_slot: int) -> NDArray[np.int32]:
        """Page of each block, ascending: page = slot * pages_per_slot + place in the slot. int32 [num_blocks]."""
        block = np.arange(self.num_blocks, dtype=np.int32)
        slots = np.asarray(self.slots, dtype=np.int32)
        return slots[block // pages_per_slot] * np.int32(pages_per_slot) + block % np.int32(pages_per_slot)


def scratch_range(
    history: int, capacity: int, stale_at: int, window: int | None, num_sink_tokens: int, block_size: int
) -> range:
    """Ordinals of a step [history, capacity) that no query reads from `stale_at` (<= capacity) on.

    stale(stale_at) ∩ [ceil(history/T), ceil(capacity/T)): a block that the step before began to fill is none.
    """
    assert stale_at <= capacity
    stale = stale_range(stale_at, window, num_sink_tokens, block_size)
    first = max(stale.start, -(-history // block_size))
    return range(first, max(first, min(stale.stop, -(-capacity // block_size))))


def scratch_until(mode: str, prompt_len: int, end: int, block_size: int) -> int:
    """Blocks of a prefill step up to `end` that are stale here may be scratch: `stale_at` above; 0 when `off`.

    `on`: all that the step outdates. `reuse`: only those that are stale too where the same prompt, asked again, would
    begin to compute: at floor((P-1)/T)*T.
    """
    if mode == "off":
        return 0
    return end if mode == "on" else min(end, (prompt_len - 1) // block_size * block_size)


def num_scratch_slots(num_blocks: int, pages_per_slot: int) -> int:
    """ceil(n / L)."""
    return -(-num_blocks // pages_per_slot)


def page_table(
    table: NDArray[np.int32], scratch: Scratch | None, pages_per_slot: int, position: int
) -> NDArray[np.int32]:
    """Pages that the layer at `position` of its group reads and writes: index = ordinal, -1 where there is no slot.

    A block with a slot of its own lies at the layer's own place in it, a scratch block where `Scratch` put it.
    """
    pages = np.where(table >= 0, table * np.int32(pages_per_slot) + np.int32(position), table).astype(np.int32)
    if scratch is not None:
        pages[scratch.first : scratch.first + scratch.num_blocks] = scratch.pages(pages_per_slot)
    return pages
