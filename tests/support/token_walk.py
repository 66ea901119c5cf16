"""What must move, by walking token positions. Knows transformers' modules and nothing of disagg."""

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


def attended(position: int, query: int, window: int | None) -> bool:
    return position <= query and (window is None or position > query - window)


def needed_blocks(prompt_len: int, window: int | None, block_size: int, horizon: int = 4) -> set[int]:
    """Blocks that hold a prompt token which one of the next `horizon` queries attends; later ones attend no other."""
    return {
        token // block_size
        for token in range(prompt_len)
        if any(attended(token, query, window) for query in range(prompt_len, prompt_len + horizon))
    }


def minimum_nbytes(layers: list[StoredLayer], prompt_len: int, block_size: int) -> Counter[int | None]:
    """Bytes that must move, by window."""
    total: Counter[int | None] = Counter()
    for layer in layers:
        blocks = needed_blocks(prompt_len, layer.window, block_size)
        total[layer.window] += len(blocks) * block_size * layer.token_nbytes
    return total
