"""What a cache must hold, found by walking token positions. Shares no arithmetic with `disagg.cache`."""

from __future__ import annotations

from support.token_walk import attends

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


def tiny_layout(
    *windows: int | None, block_size: int = 4, num_sink_tokens: int = 0, max_model_len: int = 1 << 20
) -> CacheLayout:
    """One layer per entry, head_dim 2; equal windows make one group. Slots of groups with equally many layers agree."""
    layers = [
        LayerSpec(i, w, num_sink_tokens if w is not None else 0, 1, 2, "float32", i) for i, w in enumerate(windows)
    ]
    return derive_layout(layers, block_size=block_size, max_model_len=max_model_len)
