"""What a cache must hold, found by walking token positions. Shares no arithmetic with `disagg.cache`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from support.oracles.token_walk import attends

from disagg.cache.layout import CacheLayout, LayerGroup, LayerSpec, derive_layout


def readable_later(key: int, first_query: int, window: int | None, num_sink_tokens: int) -> bool:
    """Whether any query from `first_query` on reads `key`: the first that can is the nearest."""
    return attends(max(key, first_query), key, window, num_sink_tokens)


def needed_blocks(prompt_len: int, window: int | None, num_sink_tokens: int, block_size: int) -> list[int]:
    """Ordinals with a stored token that the queries after the prompt read."""
    tokens = (t for t in range(prompt_len) if readable_later(t, prompt_len, window, num_sink_tokens))
    return sorted({t // block_size for t in tokens})


def resident_blocks(capacity: int, history: int, group: LayerGroup, block_size: int) -> set[int]:
    """Ordinals with a token, stored or about to be, that a query from `history` on reads."""
    blocks = set()
    for token in range(-(-capacity // block_size) * block_size):
        if readable_later(token, history, group.window, group.num_sink_tokens):
            blocks.add(token // block_size)
    return blocks


def outdated_blocks(history: int, capacity: int, until: int, group: LayerGroup, block_size: int) -> list[int]:
    """Blocks, none of whose tokens was there before the step, that no query from `until` on reads; token by token."""
    found = []
    for ordinal in range(-(-capacity // block_size)):
        tokens = range(ordinal * block_size, (ordinal + 1) * block_size)
        is_new = all(token >= history for token in tokens)
        if is_new and not any(readable_later(token, until, group.window, group.num_sink_tokens) for token in tokens):
            found.append(ordinal)
    return found


def num_seats(layout: CacheLayout, num_slots: Sequence[int], max_model_len: int, max_num_batched_tokens: int) -> int:
    """Sequences of the longest that pools of so many slots, two reserved, hold at once without scratch: as published.

    windowed slots >= N*(floor((W+T-2)/T)+1+sink_blocks) + ceil(B/T) + min(N, 8), a full group all blocks of all.
    """
    size, count = layout.block_size, 0
    whole, step = math.ceil(max_model_len / size), math.ceil(max_num_batched_tokens / size)
    while True:
        count += 1
        demand = [2] * layout.num_pools
        for group, pool in zip(layout.groups, layout.pool_of_group, strict=True):
            most = count * whole
            if group.window is not None:
                live = (group.window + size - 2) // size + 1 + math.ceil(group.num_sink_tokens / size)
                most = min(most, count * live + step + min(count, 8))
            demand[pool] += most
        if any(need > have for need, have in zip(demand, num_slots, strict=True)):
            return count - 1


def tiny_layout(
    *windows: int | None, block_size: int = 4, num_sink_tokens: int = 0, max_model_len: int = 1 << 20
) -> CacheLayout:
    """One layer per entry, head_dim 2; equal windows make one group. Slots of groups with equally many layers agree."""
    layers = [
        LayerSpec(i, w, num_sink_tokens if w is not None else 0, 1, 2, "float32", i) for i, w in enumerate(windows)
    ]
    return derive_layout(layers, block_size=block_size, max_model_len=max_model_len)
