"""Where a decode step goes: the model, sampling, and what the engine adds around them.

    .venv/bin/python benchmarks/step_share.py [--models demo 100m] [--steps 200] [--threads 1]

One engine with the bundled model in float32 (or benchmarks/engine.py's of 100M parameters), prompts of 300 tokens,
greedy, prefixes cached as by default. `blocks` is scheduling with its block tables, promises and prefix registration;
`other` what is left: the runner's and sampler's inputs, events, ends.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import engine as contest  # the neighbour file: models, and how they are made ready
import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.budget import split_budget
from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import derive_layout
from disagg.engine.commands import AttemptKey, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.runner import Runner
from disagg.engine.sampler import draw
from disagg.transceiver.wire.messages.values import Sampling

BATCHES = (1, 8, 32)
PROMPT_LEN = 300
MAX_MODEL_LEN = 1024


class Stopwatch:
    """Seconds spent in the functions it wraps, since the last `take`."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def wrap(self, function: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            started = contest.clock()
            try:
                return function(*args, **options)
            finally:
                self._seconds += contest.clock() - started

        return timed

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def make_engine(model: LoadedModel, forward: Stopwatch, sampler: Stopwatch) -> Engine:
    """An engine over `model`, as a worker has it."""
    layout = derive_layout(model.layers, block_size=16, max_model_len=MAX_MODEL_LEN)
    config = EngineConfig(role="both", max_num_seqs=64, max_num_batched_tokens=512, max_model_len=MAX_MODEL_LEN)
    num_slots = split_budget(
        layout,
        nbytes=1 << 30,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    cache = KVCache(layout, num_slots, hasher=BlockHasher(b"k" * 32, "demo"))
    runner = Runner(model, cache)
    runner.execute = forward.wrap(runner.execute)  # type: ignore[method-assign]
    return Engine(runner, cache, config, draw=sampler.wrap(draw))


def begin(engine: Engine, batch: int, temperature: float) -> None:
    """Compute `batch` prompts: from here every step decodes all of them."""
    generator = torch.Generator().manual_seed(batch)
    sampling = Sampling(max_tokens=MAX_MODEL_LEN - PROMPT_LEN, temperature=temperature, ignore_eos=True)
    keys = [AttemptKey(f"{batch}-{i}", 1) for i in range(batch)]
    for key in keys:
        prompt = torch.randint(3, 2048, (PROMPT_LEN,), generator=generator).tolist()
        engine.handle(Serve(key, tuple(prompt), sampling))
    while engine.stats().prompt_tokens_computed < batch * PROMPT_LEN:
        engine.step()


def _timed(engine: Engine) -> float:
    started = contest.clock()
    engine.step()
    return contest.clock() - started


@dataclass(frozen=True, slots=True)
class Share:
    """Medians over the steps of one batch, in milliseconds."""

    batch: int
    step: float
    model: float
    sampling: float
    blocks: float
    other: float

    def __str__(self) -> str:
        shares = f"{self.blocks / self.step:.1%} | {(self.blocks + self.other) / self.step:.1%}"
        times = f"{self.step:.2f} | {self.model:.2f} | {self.sampling:.2f} | {self.blocks:.3f} | {self.other:.3f}"
        return f"{self.batch} | {times} | {shares} |"


def measure(model: LoadedModel, batch: int, steps: int, temperature: float = 0.0) -> Share:
    forward, sampler, blocks = Stopwatch(), Stopwatch(), Stopwatch()
    engine = make_engine(model, forward, sampler)
    scheduler = engine._scheduler
    for name in ("schedule", "advance", "admit"):
        setattr(scheduler, name, blocks.wrap(getattr(scheduler, name)))
    begin(engine, batch, temperature)
    parts: list[tuple[float, float, float, float]] = []
    for _ in range(steps):
        forward.take(), sampler.take(), blocks.take()
        parts.append((_timed(engine), forward.take(), sampler.take(), blocks.take()))
    step, model_s, sampling, blocks = (statistics.median(column) * 1e3 for column in zip(*parts, strict=True))
    other = statistics.median(total - sum(rest) for total, *rest in parts) * 1e3
    return Share(batch, step, model_s, sampling, blocks, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(contest.MODELS), default=["demo"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(circumstances())
    print("\n| model | batch | step ms | model ms | sampling ms | blocks ms | other ms | blocks | blocks and other |")
    print("|" + "---|" * 9)
    for name in options.models:
        model = contest.suited(contest.MODELS[name]())
        for batch in BATCHES:
            print(f"| {name} | {measure(model, batch, options.steps)}", flush=True)


if __name__ == "__main__":
    main()
