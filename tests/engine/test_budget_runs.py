"""What a budget is said to seat really runs at once: the published example, a sixteenth of its lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.engine_pair import greedy, key

from disagg.cache.budget import num_seated, num_seated_by_length, seats, split_budget
from disagg.cache.cache import KVCache
from disagg.cache.layout import LayerSpec, derive_layout
from disagg.engine.commands import FinishedEvent, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.runner import Chunk

VOCAB_SIZE = 8
LIMITS = {"max_model_len": 512, "max_num_batched_tokens": 256}
NBYTES = 20 << 20


class IndifferentRunner:
    """Computes nothing: what is tested is who holds which block, and when."""

    def execute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return torch.zeros(sum(chunk.wants_logits for chunk in chunks), VOCAB_SIZE)


def test_an_engine_runs_as_many_of_the_longest_as_the_budget_seats_without_preemption() -> None:
    """Ten windowed layers (W 64) to four full ones, 512 tokens, blocks of 4: 2.5 times the max-length split."""
    layers = [LayerSpec(i, 64 if i < 10 else None, 0, 1, 16, "float32", i) for i in range(14)]
    layout = derive_layout(layers, block_size=4, max_model_len=512)
    count = num_seated(layout, NBYTES, **LIMITS)
    assert count >= 2.5 * num_seated_by_length(layout, NBYTES, max_model_len=512)
    slots = split_budget(layout, nbytes=NBYTES, max_num_seqs=count, **LIMITS)
    assert seats(layout, slots, **LIMITS) >= count
    cache = KVCache(layout, slots)
    engine = Engine(IndifferentRunner(), cache, EngineConfig("both", count, 256, 512, False, VOCAB_SIZE))
    for number in range(count):
        engine.handle(Serve(key(number), (1,) * 32, greedy(480, ignore_eos=True)))
    most, finished = 0, 0
    while engine.has_work:
        most = max(most, len(engine._scheduler.answers))
        finished += sum(isinstance(event, FinishedEvent) for event in engine.step())
    assert (most, finished, engine.stats().num_preemptions) == (count, count, 0)
    assert engine.stats().num_used_slots == 0
    cache.close()
