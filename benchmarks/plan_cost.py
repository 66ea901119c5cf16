"""Cost of bookkeeping by prompt length, with prefix caching as workers have it.

    .venv/bin/python benchmarks/plan_cost.py [--repeat 30]

48 layers, 40 of window 1024 and 8 full, blocks of 16 tokens; heads are tiny, because no byte is computed here. Pools
hold one such prompt, so that whatever begins evicts what was cached. Times are the least of `--repeat` runs: what the
code takes, not what a neighbour on the machine takes from it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.admission import peak_slots
from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.engine.commands import AttemptKey, Command, Decode, Reserve, ReservedEvent
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.run.runner import Chunk
from disagg.engine.scheduler import REGISTERED_AT_ONCE
from disagg.transceiver.layout.required import moved_nbytes, required_units
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState

PROMPT_LENGTHS = (1 << 10, 8 << 10, 32 << 10, 128 << 10)
BLOCK_SIZE, WINDOW, NUM_LAYERS = 16, 1024, 48
CHUNK = 2048
NUM_DECODE_STEPS = 256  # sixteen blocks: some steps begin one, most do not
COLUMNS = ("plan", "reserve", "match", "register", "decode step", "prefill chunk", "longest turn")

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds.

    One plan; one reservation of a prompt that is not cached; the match of one that is; the registration of so many
    received blocks as one step takes; one decode step; one prefill chunk; the longest turn of a model thread, command
    or step, while a decode worker receives the prompt, answers it, and receives it again.
    """

    prompt_len: int
    plan_us: float
    reserve_us: float
    match_us: float
    register_us: float
    decode_us: float
    chunk_us: float
    turn_us: float

    def row(self, name: str) -> str:
        prompt_len, *figures = astuple(self)
        return f"| {name} | {prompt_len} | " + " | ".join(f"{value:.1f}" for value in figures) + " |"


def layout_of(*, with_full: bool) -> CacheLayout:
    """Every sixth layer is full, or none."""
    layers = [
        LayerSpec(i, None if with_full and i % 6 == 5 else WINDOW, 0, 1, 2, "bfloat16", i) for i in range(NUM_LAYERS)
    ]
    return derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=1 << 20)


def make_cache(layout: CacheLayout, prompt_len: int) -> KVCache:
    peaks = peak_slots(layout, total_tokens=prompt_len + NUM_DECODE_STEPS + 1, history=0, step_tokens=CHUNK)
    return KVCache(layout, [peak + 2 for peak in peaks], hasher=BlockHasher(b"k" * 32, "model"))


def measure(layout: CacheLayout, prompt_len: int, repeat: int) -> Cost:
    cache = make_cache(layout, prompt_len)
    few = max(1, repeat // 10)  # of what takes a second at 128k tokens
    try:
        return Cost(
            prompt_len,
            least_us(lambda: plan(layout, prompt_len), repeat),
            least_us(lambda: reserve(cache, new_prompt(prompt_len)), repeat),
            least_us(lambda: match(cache, new_prompt(prompt_len)), few),
            least_us(lambda: register(cache, new_prompt(prompt_len)), repeat),
            least_us(lambda: decode(cache, new_prompt(prompt_len)), repeat) / NUM_DECODE_STEPS,
            least_us(lambda: prefill(cache, new_prompt(prompt_len)), few) / -(-prompt_len // CHUNK),
            longest_turn_us(layout, prompt_len, few),
        )
    finally:
        cache.close()


NUMBERS = itertools.count()


def new_prompt(length: int) -> Tokens:
    """No two begin alike."""
    first = next(NUMBERS)
    return tuple(range(first, first + length))


def plan(layout: CacheLayout, prompt_len: int) -> float:
    """Seconds to find what must move to a worker that holds a sixteenth of the prompt, and its bytes."""
    held = [range(prompt_len // 16 // BLOCK_SIZE) for _ in layout.groups]
    unit_nbytes = [layout.slot_nbytes[pool] for pool in layout.pool_of_group]
    started = time.perf_counter()
    moved_nbytes(required_units(layout.groups, prompt_len, BLOCK_SIZE, held), unit_nbytes)
    return time.perf_counter() - started


def reserve(cache: KVCache, prompt: Tokens) -> float:
    """Seconds from `open` to `close_sequence`."""
    started = time.perf_counter()
    sequence = received(cache, prompt)
    cache.close_sequence(sequence)
    return time.perf_counter() - started


def received(cache: KVCache, prompt: Tokens) -> CachedSequence:
    sequence = cache.open("a")
    assert cache.reserve(sequence, prompt, capacity=len(prompt) + 1) is not None
    return sequence


def match(cache: KVCache, prompt: Tokens) -> float:
    prefill(cache, prompt)
    sequence = cache.open("a")
    started = time.perf_counter()
    reused = cache.reuse_prefix(sequence, prompt)
    took = time.perf_counter() - started
    assert reused == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    cache.close_sequence(sequence)
    return took


def register(cache: KVCache, prompt: Tokens) -> float:
    sequence = received(cache, prompt)
    tokens = prompt[: REGISTERED_AT_ONCE * BLOCK_SIZE]
    started = time.perf_counter()
    cache.commit(sequence, tokens)
    took = time.perf_counter() - started
    assert sequence.committed == len(tokens) // BLOCK_SIZE * BLOCK_SIZE
    cache.close_sequence(sequence)
    return took


def decode(cache: KVCache, prompt: Tokens) -> float:
    sequence, tokens = received(cache, prompt), prompt + (0,) * NUM_DECODE_STEPS
    cache.commit(sequence, prompt)
    started = time.perf_counter()
    for stored in range(len(prompt), len(tokens)):
        if stored >= sequence.room:
            assert cache.resize(sequence, capacity=stored + 1, history=stored)
        if (stored + 1) % BLOCK_SIZE == 0:
            cache.commit(sequence, tokens[sequence.committed : stored + 1])
    took = time.perf_counter() - started
    cache.close_sequence(sequence)
    return took


def prefill(cache: KVCache, prompt: Tokens) -> float:
    sequence = cache.open("a")
    started = time.perf_counter()
    for start in range(cache.reuse_prefix(sequence, prompt), len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        assert cache.resize(sequence, capacity=end, history=start)
        cache.commit(sequence, prompt[sequence.committed : end])
        assert cache.resize(sequence, capacity=end, history=end)
    took = time.perf_counter() - started
    cache.close_sequence(sequence)
    return took


class IndifferentRunner:
    """Computes nothing: every step takes what the engine takes."""

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(sum(chunk.wants_logits for chunk in chunks), 8)


def longest_turn_us(layout: CacheLayout, prompt_len: int, repeat: int) -> float:
    """Each time another prompt, in a cache full of those before; the least of the longest turns."""
    cache = make_cache(layout, prompt_len)
    config = EngineConfig("decode", max_num_seqs=8, max_num_batched_tokens=CHUNK, max_model_len=1 << 20)
    engine = Engine(IndifferentRunner(), cache, config)
    prompts = [new_prompt(prompt_len) for _ in range(repeat + 1)]
    turns = [[answer(engine, f"{n}-{again}", prompt) for again in (0, 1)] for n, prompt in enumerate(prompts)]
    cache.close()
    first, second = zip(*turns[1:], strict=True)  # the first found an empty cache
    longest: float = max(min(first), min(second))
    return longest * 1e6


def answer(engine: Engine, name: str, prompt: Tokens) -> float:
    """Seconds of the longest turn from `Reserve` to the end of the answer."""
    sampling = Sampling(max_tokens=NUM_DECODE_STEPS, temperature=0.0, ignore_eos=True)
    key = AttemptKey(name, 1)
    verified = Verified(name, 1, FirstToken(0, None, SamplingState(0, ((0, 1),)), 0))
    commands: list[Command] = [Reserve(key, prompt, sampling), Decode(key, verified)]
    turns = []
    while commands or engine.has_work:
        started = time.perf_counter()
        events = engine.handle(commands.pop(0)) if commands else engine.step()
        turns.append(time.perf_counter() - started)
        assert len(turns) > 1 or isinstance(events[0], ReservedEvent)
    assert len(turns) == 2 + NUM_DECODE_STEPS - 1
    return max(turns)


def least_us(run: Callable[[], float], repeat: int) -> float:
    return min(run() for _ in range(repeat)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as workers do, see worker/main.py
    print(circumstances())
    print("\n| layers | prompt | " + " | ".join(f"{name} µs" for name in COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for name, with_full in (("48 windowed", False), ("40 windowed, 8 full", True)):
        for prompt_len in PROMPT_LENGTHS:
            print(measure(layout_of(with_full=with_full), prompt_len, repeat).row(name))


if __name__ == "__main__":
    main()
