"""What must move, by walking token positions. Knows transformers' modules and nothing of disagg. Slow on purpose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredLayer:
    """One attention layer that stores KV of its own. `window` None = full attention."""

    window: int | None
    token_nbytes: int


def stored_layers(model: Any, *, itemsize: int) -> list[StoredLayer]:
    """Layers of a transformers model that own KV; `itemsize` bytes per element."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ] * len(model.model.layers)
    layers = []
    for kind, layer in zip(types, model.model.layers, strict=True):
        attention = layer.self_attn
        if getattr(attention, "is_kv_shared_layer", False):
            continue
        window = config.sliding_window if kind == "sliding_attention" else None
        layers.append(StoredLayer(window, 2 * attention.k_proj.out_features * itemsize))
    return layers


def attends(query: int, key: int, window: int | None, num_sink_tokens: int = 0) -> bool:
    """Whether a query at one position reads the key at another."""
    if key > query:
        return False
    if window is None or key < num_sink_tokens:
        return True
    return query - key < window


def needed_blocks(prompt_len: int, window: int | None, block_size: int, num_sink_tokens: int = 0) -> set[int]:
    """Blocks that hold a token t < P which some later query, at P, P+1, ..., reads: beyond P + W none reads others."""
    queries = range(prompt_len, prompt_len + (window or 0) + 1)
    return {
        key // block_size
        for key in range(prompt_len)
        if any(attends(query, key, window, num_sink_tokens) for query in queries)
    }


def minimum_nbytes(layers: list[StoredLayer], prompt_len: int, block_size: int) -> Counter[int | None]:
    """Bytes that must move, by window."""
    total: Counter[int | None] = Counter()
    for layer in layers:
        blocks = needed_blocks(prompt_len, layer.window, block_size)
        total[layer.window] += len(blocks) * block_size * layer.token_nbytes
    return total
