"""Decode throughput of the engine on a CPU against transformers' own `generate` and continuous batching.

    .venv/bin/python benchmarks/engine.py [--full] [--models demo 100m] [--batches 8 32] [--threads 1 2] [--cpu-time]

One process, the same weights in float32, the same threads, greedy, contenders in turns; the first turn warms up and is
not counted. A figure is tokens per second of decoding: the batch over the median time of a step that gives every
sequence a token. For us that is `Engine.step` (scheduling, block tables, forward, sampling, events), for `generate`
the time between two calls of a stopping criterion, for continuous batching that between the time stamps of a request's
tokens. Lengths are `equal`, or `mixed`: evenly from an eighth of the longest to the longest. `generate` has those
padded on the left, sdpa, no compilation, and either of two caches.

What stands before the decoded tokens is random K and V in every cache but that of continuous batching, which has no way
in and computes its prompts: no time here depends on values.

`bare` is what overhead is measured against: the forward of the same modules for the same tokens, with attention over K
and V that lie ready, contiguous and without padding, in one call per layer (`scaled_dot_product_attention`, queries
packed by kv head, no mask). Nothing is stored, gathered, scheduled or sampled. Overhead is step / bare - 1, once
against the modules as transformers has them, once against those with the engine's packed linear layers. Only equal
lengths have it: without a gather no one call attends over ragged lengths.

`--cpu-time` counts CPU time of the process, which with one thread says on a busy machine what wall time would on a
quiet one, save what neighbours do to caches; with more it counts threads that wait for each other.

Without `--full`: all cores, short turns, and no continuous batching of the large model, whose prompts take minutes.
With `--cpu-time` there is none at all, for its stamps are of wall time.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from disagg.bench.circumstances import circumstances
from disagg.cache.cache import KVCache
from disagg.cache.layout import LayerSpec, derive_layout
from disagg.engine.commands import AttemptKey, Release, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model import hf
from disagg.engine.model.cpu_layers import suit_cpu
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.packed_linear import pack_linears
from disagg.engine.model.probe import probe
from disagg.engine.run.runner import Chunk, Runner
from disagg.kernels import native_attention, native_layers, native_matmul
from disagg.kernels.dispatch import CALLS
from disagg.kernels.native_decoder import DECODER
from disagg.transceiver.wire.messages.values import Sampling

BLOCK_SIZE = 16
LONGEST = 512
HEAD_START = 40  # more steps than the engine needs to take up all prompts: it begins 8 at once
# What a worker here decodes with: its name, and what the dispatcher counts.
IN_PARTS = ("compiled", (native_attention.ATTENTION, native_layers.QKV, native_layers.NORM, "packed_linear"))
WHOLE = ("whole compiled layers", (DECODER, "packed_linear"))
IN_TORCH = ("torch", ("torch:paged_attention", "packed_linear"))
MIXED_KINDS = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(12)]
Seconds = list[float]
_hf: Any = hf.transformers  # type: ignore[attr-defined]  # through the one module that imports it


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences of these lengths, each of which gets `num_steps` more tokens after its first."""

    name: str
    lengths: tuple[int, ...]
    num_steps: int

    @property
    def is_equal(self) -> bool:
        return len(set(self.lengths)) == 1


def equal(batch: int, longest: int, num_steps: int) -> Load:
    return Load("equal", (longest,) * batch, num_steps)


def mixed(batch: int, longest: int, num_steps: int) -> Load:
    shortest = longest // 8
    lengths = tuple(shortest + (longest - shortest) * i // (batch - 1) for i in range(batch))
    return Load("mixed", lengths, num_steps)


clock = time.perf_counter


def count_cpu_time() -> None:
    global clock
    clock = time.process_time


# --- models -------------------------------------------------------------------------------------------------


def demo_model() -> LoadedModel:
    return load_model(Path(str(files("disagg") / "demo_model")), dtype="float32")


def random_gemma3(kinds: Sequence[str] = MIXED_KINDS) -> LoadedModel:
    """100M parameters of Gemma 3: 12 layers, as they come every fourth with full attention, untied head.

    Normal weights of std 0.02, the class's own: activations stay of order 1 through every norm.
    """
    config = _hf.Gemma3TextConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=256,
        layer_types=list(kinds),
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return random_model(_hf.Gemma3ForCausalLM, config)


def random_model(kind: Any, config: Any) -> LoadedModel:
    """The class's own initial weights, rounded to bfloat16 as checkpoints' are, in float32."""
    torch.manual_seed(0)
    module = kind(config).eval().bfloat16().float()
    module.set_attn_implementation(hf.ATTENTION_NAME)
    layers = tuple(
        LayerSpec(call.layer, call.window, 0, call.num_kv_heads, call.head_dim, "float32", call.producer)
        for call in probe(module, "cpu")
    )
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    return LoadedModel(module, layers, config.vocab_size, 4096, "float32", torch.device("cpu"), "", nbytes)


MODELS: dict[str, Callable[[], LoadedModel]] = {"demo": demo_model, "100m": random_gemma3}


# --- contenders ---------------------------------------------------------------------------------------------


def our_path() -> tuple[str, tuple[str, ...]]:
    """What decodes here with as many threads as there are now."""
    if not native_layers.is_loaded():
        return IN_TORCH
    return WHOLE if native_matmul.serves(torch.float32) else IN_PARTS


def suited(model: LoadedModel, *, is_kept: bool = True) -> LoadedModel:
    """`model` as a worker on a CPU runs it, for as many threads as there are now; beside the original if it is kept."""
    module = copy.deepcopy(model.module) if is_kept else model.module
    suit_cpu(module)
    return replace(model, module=module)


def packed(model: LoadedModel) -> LoadedModel:
    """`model` with the linear layers that workers have, and nothing else of theirs."""
    module = copy.deepcopy(model.module)
    pack_linears(module)
    return replace(model, module=module)


class UncomputedPrompts:
    """A runner that skips prompts: what lies in the pool is their KV. Decodes are `runner`'s."""

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        self._runner, self._vocab_size = runner, vocab_size

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        if all(chunk.start > 0 and len(chunk.token_ids) == 1 for chunk in chunks):
            return self._runner.execute(chunks, drawn)
        return torch.zeros(sum(chunk.wants_logits for chunk in chunks), self._vocab_size)


class Ours:
    """The engine as a worker runs it."""

    name = "engine"

    def __init__(self, model: LoadedModel, max_batch: int, longest: int) -> None:
        self._model, self._number = model, 0
        self.path = our_path()
        layout = derive_layout(model.layers, block_size=BLOCK_SIZE, max_model_len=longest)
        per_sequence = layout.num_blocks(longest) + 2
        num_slots = [2 + max_batch * per_sequence * len(layout.groups)] * layout.num_pools
        self._cache = KVCache(layout, num_slots)
        for group in range(layout.num_groups):
            self._cache.group_view(group).normal_()
        self._runner = Runner(model, self._cache)
        runner = UncomputedPrompts(self._runner, model.vocab_size)
        config = EngineConfig("both", max_num_seqs=max_batch, max_num_batched_tokens=1 << 20, max_model_len=longest)
        self._engine = Engine(runner, self._cache, config)

    def run(self, load: Load) -> Seconds:
        """Seconds of each step. SystemExit where they did not take the path that the table claims."""
        CALLS.clear()
        times = self._run(load)
        if missing := [name for name in self.path[1] if not CALLS[name]]:
            raise SystemExit(f"error: {self.name}: `{missing[0]}` was not counted, but {dict(CALLS)}")
        return times

    def _run(self, load: Load) -> Seconds:
        module: Any = self._model.module
        module.set_attn_implementation(hf.ATTENTION_NAME)
        # The first answers begin some steps before the last prompt is taken up.
        sampling = Sampling(max_tokens=load.num_steps + HEAD_START, temperature=0.0, ignore_eos=True)
        self._number += 1
        keys = [AttemptKey(f"{self._number:016x}{i:016x}", 1) for i in range(len(load.lengths))]
        for key, length in zip(keys, load.lengths, strict=True):
            self._engine.handle(Serve(key, (5,) * length, sampling))
        while self._num_answers() < len(keys):
            self._engine.step()
        times = [timed(self._engine.step) for _ in range(load.num_steps)]
        for key in keys:
            self._engine.handle(Release(key))
        return times

    def _num_answers(self) -> int:
        return len(self._engine._scheduler.answers)


def timed(call: Callable[[], object]) -> float:
    started = clock()
    call()
    return clock() - started


def gaps(at: Sequence[float]) -> Seconds:
    return [later - earlier for earlier, later in pairwise(at)]


class Stamps(_hf.StoppingCriteria):  # type: ignore[misc]
    """Notes when `generate` has each step's tokens; stops nothing."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at.append(clock())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @property
    def steps(self) -> Seconds:
        return gaps(self.at)


class Generate:
    """transformers' `generate` on a left-padded batch, with one of its caches, sdpa."""

    def __init__(self, model: LoadedModel, cache: str) -> None:
        self.name = f"generate, {cache}"
        self._model, self._cache_name = model, cache
        self._filled: dict[Load, Any] = {}
        arguments = inspect.signature(model.module.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"  # as transformers 5.24 renamed it

    def run(self, load: Load) -> Seconds:
        module: Any = self._model.module
        module.set_attn_implementation("sdpa")
        longest, stamps = max(load.lengths), Stamps()
        mask = torch.zeros(len(load.lengths), longest + 1, dtype=torch.long)
        for row, length in zip(mask, load.lengths, strict=True):
            row[longest - length :] = 1
        module.generate(
            torch.full(mask.shape, 5),
            attention_mask=mask,
            **{self._cache_argument: copy.deepcopy(self._cache(load))},
            do_sample=False,
            max_new_tokens=load.num_steps + 1,
            min_new_tokens=load.num_steps + 1,
            stopping_criteria=[stamps],
            disable_compile=True,
        )
        return stamps.steps

    def _cache(self, load: Load) -> Any:
        if load not in self._filled:
            self._filled = {load: self._fill(load)}
        return self._filled[load]

    def _fill(self, load: Load) -> Any:
        config, longest = self._model.module.config, max(load.lengths)
        if self._cache_name == "DynamicCache":
            cache = _hf.DynamicCache(config=config)
        else:
            cache = _hf.StaticCache(config=config, max_cache_len=longest + load.num_steps + 2)
        for layer in self._model.layers:
            shape = (len(load.lengths), layer.num_kv_heads, longest, layer.head_dim)
            cache.update(torch.randn(shape), torch.randn(shape), layer.index)
        return cache


class ContinuousBatching:
    """transformers' `generate_batch`. Computes its prompts; counted is what comes after the last prompt's token."""

    name = "generate_batch"

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def run(self, load: Load) -> Seconds:
        module: Any = self._model.module
        module.set_attn_implementation("sdpa")
        total = sum(load.lengths) + len(load.lengths) * (load.num_steps + 2)
        sizes = _hf.ContinuousBatchingConfig(
            page_size=BLOCK_SIZE, num_blocks=2 * total // BLOCK_SIZE + 64, max_batch_tokens=1024
        )
        generation = _hf.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = module.generate_batch(
            inputs=[[5 + i] * length for i, length in enumerate(load.lengths)],
            generation_config=generation,
            continuous_batching_config=sizes,
            max_new_tokens=2 * load.num_steps + 8,
            record_timestamps=True,
            warmup=False,
        )
        stamps = [output.timestamps for output in outputs.values()]
        begun, ended = max(times[0] for times in stamps), min(times[-1] for times in stamps)
        within = sorted(at for times in stamps[:1] for at in times if begun <= at <= ended)
        return gaps(within)


class Bare:
    """The same modules and tokens, K and V ready: see above."""

    def __init__(self, model: LoadedModel, name: str = "bare") -> None:
        self._model, self.name = model, name
        self._kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._attention = name.replace(" ", "_").replace(",", "")
        _hf.AttentionInterface.register(self._attention, self._attend)

    def _attend(
        self, module: Any, query: torch.Tensor, *_: Any, scaling: float, **__: Any
    ) -> tuple[torch.Tensor, None]:
        key, value = self._kv[module.layer_idx]
        grouped = query[0].transpose(0, 1).reshape(key.shape[0], key.shape[1], -1, key.shape[3])
        out = functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
        return out.reshape(1, key.shape[0], -1, key.shape[3]), None

    @torch.inference_mode()
    def run(self, load: Load) -> Seconds:
        module: Any = self._model.module
        module.set_attn_implementation(self._attention)
        batch, length = len(load.lengths), load.lengths[0] + load.num_steps // 2
        for layer in self._model.layers:
            shape = (batch, layer.num_kv_heads, min(length, layer.window or length), layer.head_dim)
            if layer.index not in self._kv or self._kv[layer.index][0].shape != shape:
                self._kv[layer.index] = torch.randn(shape), torch.randn(shape)
        tokens, positions, rows = torch.full((1, batch), 5), torch.full((1, batch), length), torch.arange(batch)
        return [
            timed(lambda: module(tokens, position_ids=positions, use_cache=False, logits_to_keep=rows))
            for _ in range(load.num_steps)
        ]


# --- the table ----------------------------------------------------------------------------------------------


class Contest:
    """One model, one number of threads: every contender, and one row per load."""

    def __init__(self, name: str, model: LoadedModel, batches: Sequence[int], num_steps: int, *, cb: bool) -> None:
        self.name, self._batches, self._num_steps = name, batches, num_steps
        self.ours = Ours(suited(model), max(batches), LONGEST + num_steps + HEAD_START)
        self.generates = [Generate(model, cache) for cache in ("DynamicCache", "StaticCache")]
        self.bares = [Bare(model), Bare(packed(model), "bare, packed")]
        self.batching = ContinuousBatching(model) if cb else None

    def rows(self, turns: int) -> Iterator[str]:
        for batch in self._batches:
            for make in (equal, mixed):
                yield self._row(make(batch, LONGEST, self._num_steps), turns)

    def _row(self, load: Load, turns: int) -> str:
        times = self._measure(load, turns)
        step = {name: statistics.median(seconds) for name, seconds in times.items()}
        rate = {name: f"{len(load.lengths) / seconds:.0f}" for name, seconds in step.items()}
        ours, best = step[self.ours.name], min(step[each.name] for each in self.generates)
        overheads = [f"{ours / step[bare.name] - 1:.1%}" if load.is_equal else "" for bare in self.bares]
        cells = [
            *(self.name, torch.get_num_threads(), len(load.lengths), load.name, rate[self.ours.name]),
            *(rate[each.name] for each in self.generates),
            rate.get(ContinuousBatching.name, ""),
            f"{best / ours:.2f}",
            *overheads,
        ]
        return "| " + " | ".join(map(str, cells)) + " |"

    def _measure(self, load: Load, turns: int) -> dict[str, Seconds]:
        times: dict[str, Seconds] = defaultdict(list)
        for turn in range(turns + 1):
            for contender in (self.ours, *self.generates, *(self.bares if load.is_equal else ())):
                taken = contender.run(load)
                times[contender.name] += taken if turn else []
        if self.batching is not None:  # not in turns: it computes all prompts each time; its median is over one run
            times[self.batching.name] = self.batching.run(load)
        return times


HEADER = (
    "| model | threads | batch | lengths | engine tok/s | generate, DynamicCache | generate, StaticCache "
    "| generate_batch | engine / best generate | over bare | over bare, packed |\n" + "|---" * 11 + "|"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also one thread, longer turns, continuous batching of all")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["demo", "100m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU time, on a busy machine")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.cpu_time:
        count_cpu_time()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    cores = os.cpu_count() or 1
    threads = options.threads or sorted({1, cores} if options.full else {cores})
    steps = {"demo": 32 if options.full else 16, "100m": 16 if options.full else 4}
    print(circumstances(f"transformers {_hf.__version__}"))
    print("\n" + HEADER)
    for name in options.models:
        batching = (options.full or name == "demo") and not options.cpu_time
        for number in threads:
            torch.set_num_threads(number)  # before the model is made ready: what multiplies depends on it
            contest = Contest(name, MODELS[name](), options.batches, steps[name], cb=batching)
            for row in contest.rows(options.turns):
                print(row, flush=True)
    print("\nload at the end: " + ", ".join(f"{value:.1f}" for value in os.getloadavg()))


if __name__ == "__main__":
    main()
