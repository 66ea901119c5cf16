"""Cost of bookkeeping by prompt length: planning a prompt, admitting it for decode, one decode step, its prefill.

    .venv/bin/python benchmarks/plan_cost.py [--repeat 30]

48 layers, 40 of window 1024 and 8 full, blocks of 16 tokens; heads are tiny, because no byte is computed here. Times
are the least of `--repeat` runs: what the code takes, not what a neighbour on the machine takes from it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.admission import peak_slots
from disagg.cache.cache import KVCache
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.transceiver.plan import moved_nbytes, required_units

PROMPT_LENGTHS = (1 << 10, 8 << 10, 32 << 10, 128 << 10)
BLOCK_SIZE, WINDOW, NUM_LAYERS = 16, 1024, 48
CHUNK = 2048
NUM_DECODE_STEPS = 64  # four blocks: some steps begin one, most do not


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds: one plan, one reservation from open to close, one decode step, one prefill chunk."""

    prompt_len: int
    plan_us: float
    reserve_us: float
    decode_us: float
    chunk_us: float

    def row(self, name: str) -> str:
        figures = (self.plan_us, self.reserve_us, self.decode_us, self.chunk_us)
        return f"| {name} | {self.prompt_len} | " + " | ".join(f"{value:.1f}" for value in figures) + " |"


def layout_of(*, with_full: bool) -> CacheLayout:
    """Every sixth layer is full, or none."""
    layers = [
        LayerSpec(i, None if with_full and i % 6 == 5 else WINDOW, 0, 1, 2, "bfloat16", i) for i in range(NUM_LAYERS)
    ]
    return derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=1 << 20)


def measure(layout: CacheLayout, prompt_len: int, repeat: int) -> Cost:
    peaks = peak_slots(layout, total_tokens=prompt_len + NUM_DECODE_STEPS + 1, history=0, step_tokens=CHUNK)
    cache = KVCache(layout, [peak + 2 for peak in peaks])
    try:
        return Cost(
            prompt_len,
            least_us(lambda: plan(layout, prompt_len), repeat),
            least_us(lambda: reserve(cache, prompt_len), repeat),
            least_us(lambda: decode(cache, prompt_len), repeat) / NUM_DECODE_STEPS,
            least_us(lambda: prefill(cache, prompt_len), max(1, repeat // 10)) / -(-prompt_len // CHUNK),
        )
    finally:
        cache.close()


def plan(layout: CacheLayout, prompt_len: int) -> float:
    """Seconds to find what must move to a worker that holds a sixteenth of the prompt, and its bytes."""
    held = [range(prompt_len // 16 // BLOCK_SIZE) for _ in layout.groups]
    unit_nbytes = [layout.slot_nbytes[pool] for pool in layout.pool_of_group]
    started = time.perf_counter()
    moved_nbytes(required_units(layout.groups, prompt_len, BLOCK_SIZE, held), unit_nbytes)
    return time.perf_counter() - started


def reserve(cache: KVCache, prompt_len: int) -> float:
    started = time.perf_counter()
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=prompt_len + 1, history=prompt_len)
    cache.close_sequence(sequence)
    return time.perf_counter() - started


def decode(cache: KVCache, prompt_len: int) -> float:
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=prompt_len + 1, history=prompt_len)
    started = time.perf_counter()
    for stored in range(prompt_len, prompt_len + NUM_DECODE_STEPS):
        assert cache.resize(sequence, capacity=stored + 1, history=stored)
    took = time.perf_counter() - started
    cache.close_sequence(sequence)
    return took


def prefill(cache: KVCache, prompt_len: int) -> float:
    sequence = cache.open("a")
    started = time.perf_counter()
    for start in range(0, prompt_len, CHUNK):
        end = min(start + CHUNK, prompt_len)
        assert cache.resize(sequence, capacity=end, history=start)
        assert cache.resize(sequence, capacity=end, history=end)
    took = time.perf_counter() - started
    cache.close_sequence(sequence)
    return took


def least_us(run: Callable[[], float], repeat: int) -> float:
    return min(run() for _ in range(repeat)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    print(circumstances())
    print("\n| layers | prompt | plan µs | reserve µs | decode step µs | prefill chunk µs |\n|---|---|---|---|---|---|")
    for name, with_full in (("48 windowed", False), ("40 windowed, 8 full", True)):
        for prompt_len in PROMPT_LENGTHS:
            print(measure(layout_of(with_full=with_full), prompt_len, repeat).row(name))


if __name__ == "__main__":
    main()
