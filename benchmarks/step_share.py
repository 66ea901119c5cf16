"""Where a decode step of the bundled model goes: the model, sampling, and what the engine adds around them.

    .venv/bin/python benchmarks/step_share.py [--steps 200] [--threads 1]

One engine with the bundled model in float32, prompts of 300 tokens, prefixes cached as by default. `blocks` is
scheduling with its block tables, promises and prefix registration; `other` what is left: the runner's and sampler's
inputs, events, ends.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.budget import split_budget
from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import derive_layout
from disagg.engine import engine as engine_module
from disagg.engine.commands import AttemptKey, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model.cpu_layers import suit_cpu
from disagg.engine.model.load import load_model
from disagg.engine.run.runner import Runner
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
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._seconds += time.perf_counter() - started

        return timed

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def make_engine(forward: Stopwatch) -> Engine:
    model = load_model(Path(str(files("disagg") / "demo_model")), dtype="float32")
    suit_cpu(model.module)  # as a worker does
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
    return Engine(runner, cache, config)


def begin(engine: Engine, batch: int) -> None:
    """Compute `batch` prompts: from here every step decodes all of them."""
    generator = torch.Generator().manual_seed(batch)
    sampling = Sampling(max_tokens=MAX_MODEL_LEN - PROMPT_LEN, temperature=0.0, ignore_eos=True)
    keys = [AttemptKey(f"{batch}-{i}", 1) for i in range(batch)]
    for key in keys:
        prompt = torch.randint(3, 2048, (PROMPT_LEN,), generator=generator).tolist()
        engine.handle(Serve(key, tuple(prompt), sampling))
    while engine.stats().prompt_tokens_computed < batch * PROMPT_LEN:
        engine.step()


def _timed(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def measure(batch: int, steps: int) -> str:
    """One row of the table: medians over the steps, in milliseconds."""
    forward, sampler, blocks = Stopwatch(), Stopwatch(), Stopwatch()
    engine_globals = vars(engine_module)
    plain = engine_globals["sample"]
    engine_globals["sample"] = sampler.wrap(plain)
    try:
        engine = make_engine(forward)
        scheduler = engine._scheduler
        for name in ("schedule", "advance", "admit"):
            setattr(scheduler, name, blocks.wrap(getattr(scheduler, name)))
        begin(engine, batch)
        parts: list[tuple[float, float, float, float]] = []
        for _ in range(steps):
            forward.take(), sampler.take(), blocks.take()
            parts.append((_timed(engine), forward.take(), sampler.take(), blocks.take()))
    finally:
        engine_globals["sample"] = plain
    return row(batch, parts)


def row(batch: int, parts: Sequence[tuple[float, float, float, float]]) -> str:
    step, model, sampling, blocks = (statistics.median(column) * 1e3 for column in zip(*parts, strict=True))
    other = statistics.median(total - sum(rest) for total, *rest in parts) * 1e3
    shares = f"{blocks / step:.1%} | {(blocks + other) / step:.1%}"
    return f"| {batch} | {step:.2f} | {model:.2f} | {sampling:.2f} | {blocks:.3f} | {other:.3f} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(circumstances())
    print("\n| batch | step ms | model ms | sampling ms | blocks ms | other ms | blocks | blocks and other |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in BATCHES:
        print(measure(batch, options.steps))


if __name__ == "__main__":
    main()
