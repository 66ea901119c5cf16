"""What must move, found by walking token positions: every query that decode may still make, every key it attends to.

Shares no code and no formula with the planner. Slow on purpose.
"""

from __future__ import annotations


def attended(query: int, key: int, window: int | None, num_sink_tokens: int) -> bool:
    """Does a query at `query` read the key at `key`?"""
    if key > query:
        return False
    if window is None or key < num_sink_tokens:
        return True
    return query - key < window


def needed(prompt_len: int, window: int | None, num_sink_tokens: int, block_size: int) -> set[int]:
    """Ordinals of stored tokens t < P that some later query, at P, P+1, ..., reads."""
    reach = window or 0
    ordinals = set()
    for query in range(prompt_len, prompt_len + reach + 1):
        for key in range(prompt_len):
            if attended(query, key, window, num_sink_tokens):
                ordinals.add(key // block_size)
    return ordinals
