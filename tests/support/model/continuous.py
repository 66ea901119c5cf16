"""Continuous batching at its plainest, to drive a `Runner` in tests: chunked prefill and decode share every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from support.model.families import Reference

from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.layout import derive_layout
from disagg.cache.pool import NULL_SLOT, TRASH_SLOT
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.runner import Chunk, Runner

MAX_MODEL_LEN = 512


@dataclass
class Live:
    """A sequence on its way; `rows` are the logits behind each token of the answer."""

    sequence: CachedSequence
    token_ids: list[int]
    num_prompt: int
    history: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def answer(self) -> tuple[int, ...]:
        return tuple(self.token_ids[self.num_prompt :])


def make_cache(model: LoadedModel, *, block_size: int, num_slots: int, uses_scratch: bool = False) -> KVCache:
    """A cache whose every slot that nobody holds is full of NaN: only NULL is safe to read."""
    layout = derive_layout(model.layers, block_size=block_size, max_model_len=MAX_MODEL_LEN, uses_scratch=uses_scratch)
    cache = KVCache(layout, [num_slots] * layout.num_pools)
    poison_free_slots(cache)
    return cache


def poison_free_slots(cache: KVCache) -> None:
    for pool in cache.pools:
        is_free = pool.num_refs(np.arange(pool.num_slots)) == 0
        is_free[NULL_SLOT], is_free[TRASH_SLOT] = False, True
        pool.memory[np.flatnonzero(is_free)] = _nan_byte(cache)


def poison_scratch_slots(cache: KVCache, sequences: Sequence[CachedSequence]) -> None:
    """Every page of them is written before it is read, by every layer anew."""
    for sequence in sequences:
        for group, scratch in enumerate(sequence.scratch):
            if scratch is not None:
                cache.pools[cache.layout.pool_of_group[group]].memory[list(scratch.slots)] = _nan_byte(cache)


def _nan_byte(cache: KVCache) -> int:
    """What, repeated, is NaN in every float format; int8's is another."""
    return 0x80 if any(group.dtype == "int8" for group in cache.layout.groups) else 0xFF


def greedy(
    runner: Runner, prompts: Sequence[Sequence[int]], num_tokens: int, *, chunk: int, stagger: bool = True
) -> list[Live]:
    """Greedy answers of `num_tokens` to all prompts, one more of them arriving at every step when `stagger`.

    Prompts use scratch slots where the cache's layout allows it; those start a step full of NaN too.
    """
    cache = runner.cache
    lives = [Live(cache.open(i), list(prompt), len(prompt)) for i, prompt in enumerate(prompts)]
    started = 1 if stagger else len(lives)
    while any(len(live.rows) < num_tokens for live in lives):
        active = [live for live in lives[:started] if len(live.rows) < num_tokens]
        if active:
            _step(runner, active, chunk)
        for live in active:
            if len(live.rows) == num_tokens:
                cache.close_sequence(live.sequence)
                poison_free_slots(cache)
        cache.check_invariants()
        started += 1
    return lives


def _step(runner: Runner, active: Sequence[Live], chunk: int) -> None:
    chunks = []
    for live in active:
        end = min(live.history + chunk, len(live.token_ids))
        until = end if end <= live.num_prompt else 0
        fits = runner.cache.resize(live.sequence, capacity=end, history=live.history, scratch_until=until)
        assert fits, "the pool is too small"
        new = live.token_ids[live.history : end]
        wants_logits = end == len(live.token_ids)
        chunks.append(Chunk(live.sequence.tables, new, live.history, wants_logits, live.sequence.scratch))
    poison_free_slots(runner.cache)
    poison_scratch_slots(runner.cache, [live.sequence for live in active])
    logits = iter(runner.execute(chunks))
    for live, part in zip(active, chunks, strict=True):
        live.history = part.end
        assert runner.cache.resize(live.sequence, capacity=part.end, history=part.end)
        if part.wants_logits:
            live.rows.append(next(logits))
            live.token_ids.append(int(live.rows[-1].argmax()))
    assert next(logits, None) is None


def largest_error(live: Live, reference: Reference) -> float:
    """Largest difference of a log-probability among the reference's top 5 of every step."""
    errors = [
        abs(float(logprobs[token_id]) - value)
        for logprobs, top in zip((row.log_softmax(-1) for row in live.rows), reference.top_logprobs, strict=True)
        for token_id, value in top
    ]
    return max(errors)
