"""A model whose decode steps are replayed from fake graphs, beside transformers' own answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch
from support.model.continuous import Live, greedy, make_cache
from support.model.fake_graph import FakeGraphs
from support.model.families import WINDOW, Reference, safe_prompts, save_family
from support.oracles.plan_attention import plan_attention

from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.graphs.decode import DecodeGraphs, GraphRunner
from disagg.engine.run.runner import Chunk, Runner
from disagg.kernels.dispatch import forced

BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
LENGTHS = (5, WINDOW + 1, 2 * BLOCK_SIZE, 3 * WINDOW + 17)


@cache
def load_case(name: str, folder: Path, num_tokens: int) -> tuple[LoadedModel, tuple[Reference, ...]]:
    model = load_model(save_family(name, folder / name))
    return model, tuple(safe_prompts(model.module, LENGTHS, num_tokens))


class GraphedRunner:
    """Decode from graphs, all else eager in torch operations. `batches`: rows of each decode step's bucket."""

    def __init__(
        self,
        model: LoadedModel,
        kernels: AbstractContextManager[None] | None = None,
        *,
        max_num_seqs: int = 4,
        num_slots: int = 120,
    ) -> None:
        self.cache = make_cache(model, block_size=BLOCK_SIZE, num_slots=num_slots)
        self.maker = FakeGraphs()
        self.graphs = DecodeGraphs(
            model, self.cache, self.maker, max_num_seqs=max_num_seqs, max_model_len=MAX_MODEL_LEN
        )
        self.runner = GraphRunner(Runner(model, self.cache), self.graphs)
        self.buckets: list[int | None] = []
        with kernels or plan_attention():
            self.graphs.capture()

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        self.buckets.append(self.graphs.bucket(chunks))
        with forced("torch"):
            return self.runner.execute(chunks, drawn)

    def answers(self, references: Sequence[Reference], num_tokens: int) -> list[Live]:
        """Prompts in chunks of at most 61 tokens, one more arriving per step, until all have ended."""
        lives = greedy(self, [reference.prompt for reference in references], num_tokens, chunk=61)  # type: ignore[arg-type]
        self.cache.close()
        return lives


def num_equal(lives: Sequence[Live], references: Sequence[Reference]) -> int:
    return sum(live.answer == reference.token_ids for live, reference in zip(lives, references, strict=True))
