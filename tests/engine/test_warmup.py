"""What a worker computes before it is ready leaves nothing behind."""

from __future__ import annotations

import torch
from support.model.continuous import make_cache
from support.model.families import save_family

from disagg.engine.model.load import load_model
from disagg.engine.run.runner import Chunk, Runner
from disagg.engine.run.warmup import NUM_TOKENS, warm_up


class Counting(Runner):
    """Notes the steps that it runs."""

    steps: list[tuple[int, int]]

    def execute(self, chunks: list[Chunk]) -> torch.Tensor:  # type: ignore[override]
        self.steps.append((chunks[0].start, len(chunks[0].token_ids)))
        logits = super().execute(chunks)
        assert logits.isfinite().all()
        return logits


def steps_of(folder: object, max_model_len: int, num_slots: int = 40) -> list[tuple[int, int]]:
    model = load_model(save_family("gemma3", folder))  # type: ignore[arg-type]
    cache = make_cache(model, block_size=8, num_slots=num_slots)
    runner = Counting(model, cache)
    runner.steps = []
    warm_up(runner, cache, max_model_len)
    assert all(pool.num_used == 0 for pool in cache.pools)
    cache.check_invariants()
    cache.close()
    return runner.steps


def test_a_prompt_and_a_decode_step_are_run(tmp_path: object) -> None:
    assert steps_of(tmp_path, 100) == [(0, NUM_TOKENS), (NUM_TOKENS, 1)]


def test_what_has_no_room_is_left_out(tmp_path: object) -> None:
    assert steps_of(tmp_path, 6) == [(0, 5), (5, 1)]
    assert steps_of(tmp_path, 1) == [(0, 1)]
    assert steps_of(tmp_path, 100, num_slots=3) == []
