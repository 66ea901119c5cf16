"""Two engines' block lists, drawn at random, and what must be copied between them, found token by token.

Walks the prompt's positions: who holds which, who will read it, who has it already, when it is final. Shares no code
and no formula with the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from support.oracles.token_walk import attends

Place = tuple[int, int]
"""(slot, token within it)"""


@dataclass(frozen=True)
class Listed:
    """What one side has of one group: block -> slot. `end`: tokens that its last block was made for, or beyond P."""

    slots: dict[int, int]
    end: int
    is_anchored: bool


@dataclass(frozen=True)
class ListedGroup:
    """One layer group on both sides. `cached_tokens`, `held` (blocks): what the receiver has already."""

    window: int | None
    num_sink_tokens: int
    sender: Listed
    receiver: Listed
    cached_tokens: int
    held: frozenset[int]


@dataclass(frozen=True)
class ListedPrompt:
    """`chunks`: (start, end) of what is computed at once, from `num_reused` on to the prompt's end."""

    prompt_len: int
    sender_block: int
    receiver_block: int
    groups: tuple[ListedGroup, ...]
    num_reused: int
    chunks: tuple[tuple[int, int], ...]


def is_read_later(prompt: ListedPrompt, group: ListedGroup, token: int) -> bool:
    queries = range(prompt.prompt_len, prompt.prompt_len + (group.window or 0) + 1)
    return any(attends(query, token, group.window, group.num_sink_tokens) for query in queries)


def is_had(prompt: ListedPrompt, group: ListedGroup, token: int) -> bool:
    """Is it in a block that the receiver holds, or in a whole block of its cached prefix?"""
    block = token // prompt.receiver_block
    tokens_of_block = range(block * prompt.receiver_block, block * prompt.receiver_block + prompt.receiver_block)
    return block in group.held or all(one < group.cached_tokens for one in tokens_of_block)


def chunk_that_ends(prompt: ListedPrompt, token: int) -> tuple[int, int]:
    """The chunk after which every prompt token of the sender's block around `token` is there."""
    block = token // prompt.sender_block
    last = max(t for t in range(prompt.prompt_len) if t // prompt.sender_block == block)
    return next((start, end) for start, end in prompt.chunks if last < end)


def expected(prompt: ListedPrompt, group: ListedGroup, chunk: tuple[int, int] | None) -> dict[Place, Place]:
    """Destination -> source of every token that is copied; whole units of the finer block size."""
    found: dict[Place, Place] = {}
    for unit in units(prompt):
        stored = [token for token in unit if token < prompt.prompt_len]
        if not any(is_read_later(prompt, group, token) for token in stored) or is_had(prompt, group, stored[0]):
            continue
        if chunk is not None and chunk_that_ends(prompt, stored[0]) != chunk:
            continue
        places = [place(prompt, group, token) for token in unit]
        if None not in places:
            found |= dict(one for one in places if one is not None)
    return found


def units(prompt: ListedPrompt) -> Iterator[range]:
    size = min(prompt.sender_block, prompt.receiver_block)
    return (range(first, first + size) for first in range(0, prompt.prompt_len, size))


def place(prompt: ListedPrompt, group: ListedGroup, token: int) -> tuple[Place, Place] | None:
    """(destination, source) of a token that both sides have room for."""
    source = group.sender.slots.get(token // prompt.sender_block)
    slot = group.receiver.slots.get(token // prompt.receiver_block)
    if source is None or slot is None:
        return None
    return (slot, token % prompt.receiver_block), (source, token % prompt.sender_block)


def num_runs(prompt: ListedPrompt, copied: dict[Place, Place]) -> int:
    """Copies that these tokens take, in the order of the prompt, if what follows on in memory on both sides is one."""
    count, after = 0, None
    for (slot, token), (source_slot, source_token) in copied.items():
        at = slot * prompt.receiver_block + token, source_slot * prompt.sender_block + source_token
        count += at != after
        after = at[0] + 1, at[1] + 1
    return count
