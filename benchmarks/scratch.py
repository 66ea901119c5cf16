"""What `--swa-scratch` gains in memory and loses in reuse, on a prefill worker, with the cache that workers have.

    .venv/bin/python benchmarks/scratch.py

No model runs: prompts go through the real cache in chunks as the scheduler sends them, over layouts with the layers and
windows of two models. Heads are tiny, and bytes are scaled to the models'. Every number is a count, the same on any
machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from disagg.cache.admission import peak_slots
from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.cache.scratch import scratch_until
from disagg.config.quantities import format_nbytes

MODES: Final = ("off", "on", "reuse")
BLOCK_SIZE: Final = 16
MAX_MODEL_LEN: Final = 1 << 17
CHUNKS: Final = (512, 2048, 8192)
LONG: Final = 32_768

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layers: each `period`-th has full attention, the others a window. `token_nbytes`: of a layer."""

    name: str
    num_layers: int
    period: int
    window: int
    token_nbytes: int

    def layout(self, *, uses_scratch: bool) -> CacheLayout:
        layers = [
            LayerSpec(i, None if (i + 1) % self.period == 0 else self.window, 0, 1, 1, "float16", i)
            for i in range(self.num_layers)
        ]
        return derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN, uses_scratch=uses_scratch)

    def nbytes(self, layout: CacheLayout, slots: Sequence[int]) -> int:
        """Bytes of so many slots per pool in the real model; a tiny token of a layer takes 4."""
        return sum(n * size for n, size in zip(slots, layout.slot_nbytes, strict=True)) * self.token_nbytes // 4


SHAPES: Final = (
    Shape("gemma-3-12b", 48, 6, 1024, 2 * 8 * 256 * 2),
    Shape("gpt-oss-20b", 24, 2, 128, 2 * 8 * 64 * 2),
)


def seeded() -> Random:
    """The same prompts in every mode."""
    return Random(1)  # noqa: S311 (prompts, no keys)


def text(random: Random, count: int) -> Tokens:
    return tuple(random.choices(range(1000), k=count))


def chats(random: Random, *, num_chats: int = 8, num_turns: int = 6) -> Iterator[Tokens]:
    """Turns of several chats by turns; each prompt is the last one, its answer and a question."""
    histories = [text(random, 600) for _ in range(num_chats)]
    for _ in range(num_turns):
        for number, history in enumerate(histories):
            yield history
            histories[number] = history + text(random, random.randrange(100, 500))


def shared(random: Random, *, num_users: int = 32) -> Iterator[Tokens]:
    """One system prompt, then each user's own question."""
    system = text(random, 3000)
    for _ in range(num_users):
        yield system + text(random, random.randrange(50, 400))


def repeated(random: Random, *, num_prompts: int = 8) -> Iterator[Tokens]:
    """Long prompts, each asked twice in a row."""
    for _ in range(num_prompts):
        yield from [text(random, 8000)] * 2


WORKLOADS: Final[dict[str, Callable[[Random], Iterator[Tokens]]]] = {
    "chats": chats,
    "one system prompt": shared,
    "each prompt twice": repeated,
}


def prefill(cache: KVCache, prompt: Tokens, chunk: int, mode: str) -> tuple[int, int]:
    """Compute a prompt as the scheduler does, and let go of it: (tokens computed, most slot bytes in use)."""
    sequence = cache.open("prompt")
    done = cache.reuse_prefix(sequence, prompt)
    computed, peak = len(prompt) - done, 0
    while done < len(prompt):
        end = min(done + chunk, len(prompt))
        until = scratch_until(mode, len(prompt), end, BLOCK_SIZE)
        assert cache.resize(sequence, capacity=end, history=done, scratch_until=until), "the pool is too small"
        used = [usage.num_used for usage in cache.usage()]
        peak = max(peak, sum(n * size for n, size in zip(used, cache.layout.slot_nbytes, strict=True)))
        cache.commit(sequence, prompt[sequence.committed : end])
        done = end
    cache.close_sequence(sequence)
    return computed, peak


def make_cache(shape: Shape, mode: str, room: int) -> KVCache:
    """Pools for one running prompt of `LONG` tokens without scratch, and `room` times that for prefixes."""
    layout = shape.layout(uses_scratch=mode != "off")
    whole = peak_slots(shape.layout(uses_scratch=False), total_tokens=LONG, history=0, step_tokens=max(CHUNKS))
    return KVCache(layout, [2 + n * (1 + room) for n in whole], hasher=BlockHasher(b"benchmark", "model"))


def computed_share(shape: Shape, mode: str, prompts: Sequence[Tokens], chunk: int) -> float:
    """Of the prompts' tokens, what was computed: 1 without any reuse."""
    cache = make_cache(shape, mode, room=1)
    computed = sum(prefill(cache, prompt, chunk, mode)[0] for prompt in prompts)
    cache.close()
    return computed / sum(map(len, prompts))


def peak_nbytes(shape: Shape, mode: str, chunk: int) -> int:
    """The most that one prompt of `LONG` tokens holds while it is computed."""
    cache = make_cache(shape, mode, room=0)
    peak = prefill(cache, text(seeded(), LONG), chunk, mode)[1]
    cache.close()
    return peak * shape.token_nbytes // 4


def table(shape: Shape) -> Iterator[str]:
    yield f"\n{shape.name}: {shape.num_layers} layers, window {shape.window} in all but every {shape.period}th"
    yield "| | chunk | " + " | ".join(MODES) + " |"
    yield "|---|---|" + "---|" * len(MODES)
    for chunk in CHUNKS:
        sizes = " | ".join(format_nbytes(peak_nbytes(shape, mode, chunk)) for mode in MODES)
        yield f"| most KV of one prompt of {LONG} tokens | {chunk} | {sizes} |"
    for name, workload in WORKLOADS.items():
        for chunk in CHUNKS:
            prompts = list(workload(seeded()))
            shares = " | ".join(f"{computed_share(shape, mode, prompts, chunk):.0%}" for mode in MODES)
            yield f"| computed of {name} | {chunk} | {shares} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for shape in SHAPES:
        for line in table(shape):
            print(line, flush=True)


if __name__ == "__main__":
    main()
