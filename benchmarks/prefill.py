"""Prefill of the engine on a CPU against transformers' own forward, by length of the prompt; full and windowed layers.

    .venv/bin/python benchmarks/prefill.py [--models full windowed] [--lengths 128 2048] [--cpu-time]

One process, the same weights in float32, the same threads, in turns; the first turn warms up, uncounted. Ours is
one request from admission to its first token: scheduling, block tables, steps of at most `--step` tokens, sampling.
`forward` is one call of transformers' module with sdpa attention over the whole prompt for its last logits, without
a cache. `full` and `windowed` are the 100M model of benchmarks/engine.py with all layers of that kind (window
256), `demo` the bundled model. Milliseconds, medians of the turns; `ratio` is forward over ours. Per token too:
what a windowed layer costs should not grow with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import engine as contest  # the neighbour file: models, and how they are packed
import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.cache import KVCache
from disagg.cache.layout import derive_layout
from disagg.engine.commands import AttemptKey, Release, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model import hf
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.runner import Runner
from disagg.transceiver.wire.messages.values import Sampling

LENGTHS = (128, 512, 2048, 8192)
MAX_POSITIONS = {"demo": 4096}
HEADER = "| model | prompt | ours ms | forward ms | ratio | ours µs/token | forward µs/token |\n" + "|---" * 7 + "|"


def all_layers(kind: str) -> Callable[[], LoadedModel]:
    return lambda: contest.random_gemma3([kind] * 12)


MODELS: dict[str, Callable[[], LoadedModel]] = {
    "demo": contest.demo_model,
    "full": all_layers("full_attention"),
    "windowed": all_layers("sliding_attention"),
}


class Ours:
    """The engine as a worker runs it, without prefix caching: every prompt is computed."""

    def __init__(self, model: LoadedModel, longest: int, step: int) -> None:
        self._model, self._number = model, 0
        layout = derive_layout(model.layers, block_size=16, max_model_len=longest + 16)
        num_slots = [2 + 2 * layout.num_blocks(longest + 16) * len(layout.groups)] * layout.num_pools
        cache = KVCache(layout, num_slots)
        config = EngineConfig("both", max_num_seqs=8, max_num_batched_tokens=step, max_model_len=longest + 16)
        self._engine = Engine(Runner(model, cache), cache, config)

    def prepare(self) -> None:
        module: Any = self._model.module
        module.set_attn_implementation(hf.ATTENTION_NAME)

    def run(self, prompt: list[int]) -> None:
        self._number += 1
        key = AttemptKey(f"{self._number:032x}", 1)
        self._engine.handle(Serve(key, tuple(prompt), Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)))
        before = self._engine.stats().prompt_tokens_computed
        while self._engine.stats().prompt_tokens_computed < before + len(prompt):
            self._engine.step()
        self._engine.handle(Release(key))
        self._engine.step()


class Forward:
    """transformers' module as it is."""

    def __init__(self, model: LoadedModel) -> None:
        self._module: Any = model.module

    def prepare(self) -> None:
        self._module.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def run(self, prompt: list[int]) -> None:
        self._module(torch.tensor([prompt]), use_cache=False, logits_to_keep=1)


def times(
    model: LoadedModel, lengths: Sequence[int], step: int, turns: int, clock: Callable[[], float]
) -> Iterator[tuple[int, float, float]]:
    """By length: milliseconds of ours and of forward, medians of the turns."""
    longest = max(lengths)
    ours = Ours(replace(contest.suited(model), max_position_embeddings=longest + 16), longest, step)
    contenders: tuple[Ours | Forward, ...] = (ours, Forward(model))
    for length in lengths:
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns + 1):
            prompt = torch.randint(259, 2048, (length,), generator=torch.Generator().manual_seed(turn)).tolist()
            for contender, seconds in zip(contenders, taken, strict=True):
                contender.prepare()
                began = clock()
                contender.run(prompt)
                seconds += [clock() - began] if turn else []
        yield length, statistics.median(taken[0]) * 1e3, statistics.median(taken[1]) * 1e3


def rows(name: str, options: argparse.Namespace) -> None:
    lengths = [length for length in options.lengths if length <= MAX_POSITIONS.get(name, length)]
    for length, mine, theirs in times(MODELS[name](), lengths, options.step, options.turns, options.clock):
        each = f"{mine * 1e3 / length:.0f} | {theirs * 1e3 / length:.0f}"
        print(f"| {name} | {length} | {mine:.1f} | {theirs:.1f} | {theirs / mine:.2f} x | {each} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--step", type=int, default=512, help="most tokens of a step, as --max-num-batched-tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, on a busy machine")
    options = parser.parse_args()
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    print(circumstances(f"{options.threads} threads", torch.backends.cpu.get_cpu_capability()))
    print("\n" + HEADER)
    for name in options.models:
        rows(name, options)
    print("\nload at the end: " + ", ".join(f"{value:.1f}" for value in os.getloadavg()))


if __name__ == "__main__":
    main()
