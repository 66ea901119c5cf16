"""Host time of a decode step by the number and the length of its answers: scheduling, block tables, what is sent.

    .venv/bin/python -P benchmarks/block_tables.py [--answers 64 256] [--tokens 1024 32768 131072] [--steps 64]

A real engine over a real cache of one full group, with a runner that makes the step's tables and computes nothing:
`cpu` as the compiled helper reads them, `graphs` as captured steps do (the copies to a device are copies in memory
here). CPU time of the process, one thread, mean over the steps: an answer takes a new block every 16th.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.cache import KVCache
from disagg.cache.layout import LayerSpec, derive_layout
from disagg.engine.commands import AttemptKey, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.run.graphs.inputs import DecodeInputs
from disagg.engine.run.runner import Chunk
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.workspace import Workspace
from disagg.transceiver.wire.messages.values import Sampling

BLOCK_SIZE = 16
VOCAB_SIZE = 8


class TablesOnly:
    """A runner that prepares steps for `kind` and answers them with zeros."""

    def __init__(self, kind: str, cache: KVCache, max_rows: int, max_tokens: int) -> None:
        self._kind, self._pool, self._workspace = kind, cache.layer_view(0), Workspace()
        model: Any = SimpleNamespace(device=torch.device("cpu"), layers=(), saturated=None)
        self._inputs = DecodeInputs(model, cache, max_rows=max_rows, max_model_len=max_tokens)

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        if all(len(chunk.token_ids) == 1 for chunk in chunks):
            self._prepare(chunks)
        return torch.zeros(sum(chunk.wants_logits for chunk in chunks), VOCAB_SIZE)

    def _prepare(self, chunks: Sequence[Chunk]) -> None:
        if self._kind == "graphs":
            self._inputs.fill(chunks, len(chunks))
            return
        runs = tuple(QueryRun(chunk.tables[0], chunk.start, 1) for chunk in chunks)
        ops.plan(PagedBatch(runs, BLOCK_SIZE, None, 0), self._pool, torch.float32, self._workspace)


def step_ms(kind: str, num_answers: int, num_tokens: int, num_steps: int) -> float:
    longest = num_tokens + num_steps + 96
    layout = derive_layout([LayerSpec(0, None, 0, 1, 1, "float32", 0)], block_size=BLOCK_SIZE, max_model_len=longest)
    cache = KVCache(layout, [2 + num_answers * (layout.num_blocks(longest) + 2)])
    runner = TablesOnly(kind, cache, num_answers, longest)
    config = EngineConfig("both", num_answers, max_num_batched_tokens=1 << 20, max_model_len=longest)
    engine, prompt = Engine(runner, cache, config), (5,) * num_tokens
    for number in range(num_answers):
        sampling = Sampling(max_tokens=num_steps + 96, temperature=0.0, ignore_eos=True)
        engine.handle(Serve(AttemptKey(f"{number:032x}", 1), prompt, sampling))
    while engine.stats().prompt_tokens_computed < num_answers * num_tokens:
        engine.step()
    for _ in range(BLOCK_SIZE):
        engine.step()
    started = time.process_time()
    for _ in range(num_steps):
        engine.step()
    spent = time.process_time() - started
    cache.close()
    return spent / num_steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 32768, 131072])
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    print("\n| answers | tokens | cpu ms | graphs ms |\n|---|---|---|---|")
    for answers in options.answers:
        for tokens in options.tokens:
            times = [step_ms(kind, answers, tokens, options.steps) for kind in ("cpu", "graphs")]
            print(f"| {answers} | {tokens} | {times[0]:.2f} | {times[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
