"""A step of the bundled model on its fast paths: fused QKV against transformers' forward, graphs against eager.

    .venv/bin/python benchmarks/decode_step.py [--device cpu|cuda] [--repeats 100]

Contenders take turns, step by step, on the same sequences. Graphs are measured on CUDA only, where they exist; the
column "counted" is what the dispatcher counted while that row was measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from disagg.bench.circumstances import circumstances
from disagg.cache.cache import KVCache
from disagg.cache.layout import derive_layout
from disagg.engine.model.fused_qkv import fuse
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.probe import probe
from disagg.engine.run.graphs.cuda import CudaGraphs
from disagg.engine.run.graphs.decode import DecodeGraphs, GraphRunner
from disagg.engine.run.runner import Chunk, Runner, StepRunner
from disagg.kernels.dispatch import CALLS, FUSED_VARIABLE, backend

MAX_MODEL_LEN = 1024
HISTORY = 300
# (sequences, tokens of each, where they stand): decode batches, and a prefill chunk.
BATCHES = ((1, 1, HISTORY), (8, 1, HISTORY), (32, 1, HISTORY), (1, 256, 0))
COUNTED = ("graph:decode", "triton:preprocess_qkv", "torch:preprocess_qkv", "triton:write_kv", "torch:write_kv")


@dataclass(slots=True)
class Contender:
    """One way to run the same steps."""

    name: str
    runner: StepRunner
    cache: KVCache
    device: torch.device
    claim: str
    """What the dispatcher counts, in a batch of decode rows, when this way was really taken."""

    def chunks(self, batch: int, count: int, start: int) -> list[Chunk]:
        made = []
        for number in range(batch):
            sequence = self.cache.open((batch, count, number))
            assert self.cache.resize(sequence, capacity=start + count, history=start)
            made.append(Chunk(sequence.tables, [5] * count, start, True))
        return made

    def seconds(self, chunks: Sequence[Chunk]) -> float:
        self._wait()
        started = time.perf_counter()
        self.runner.execute(chunks)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def contenders(device: str) -> list[Contender]:
    plain, fused = (_load(device, is_fused=is_fused) for is_fused in (False, True))
    kernels = backend(fused.device).NAME
    found = [
        _contender("transformers' forward", plain, f"{kernels}:write_kv"),
        _contender("fused QKV", fused, f"{kernels}:preprocess_qkv"),
    ]
    if fused.device.type == "cuda":
        found.append(_contender("fused QKV, graphs", fused, "graph:decode", graphs=True))
    return found


@contextmanager
def _unfused() -> Iterator[None]:
    """Inside, models are loaded with transformers' own forward, whatever serves the device."""
    before = os.environ.get(FUSED_VARIABLE)
    os.environ[FUSED_VARIABLE] = "off"
    try:
        yield
    finally:
        os.environ.pop(FUSED_VARIABLE)
        if before is not None:
            os.environ[FUSED_VARIABLE] = before


def _load(device: str, *, is_fused: bool) -> LoadedModel:
    with _unfused():
        model = load_model(Path(str(files("disagg") / "demo_model")), dtype="float32", device=device)
    if is_fused:
        fuse(model.module, probe(model.module, device))
    return model


def _contender(name: str, model: LoadedModel, claim: str, *, graphs: bool = False) -> Contender:
    layout = derive_layout(model.layers, block_size=16, max_model_len=MAX_MODEL_LEN)
    cache = KVCache(layout, [1200] * layout.num_pools, str(model.device))
    runner: StepRunner = Runner(model, cache)
    if graphs:
        maker = CudaGraphs(model.device)
        captured = DecodeGraphs(model, cache, maker, max_num_seqs=32, max_model_len=MAX_MODEL_LEN)
        captured.capture()
        runner = GraphRunner(runner, captured)
    return Contender(name, runner, cache, model.device, claim)


def measure(ways: Sequence[Contender], batch: int, count: int, start: int, repeats: int) -> list[str]:
    """A row per contender: median milliseconds, and its share of the first one's."""
    chunks = [way.chunks(batch, count, start) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    counted = [""] * len(ways)
    for repeat in range(repeats):
        for number in sorted(range(len(ways)), reverse=bool(repeat % 2)):
            CALLS.clear()
            seconds[number].append(ways[number].seconds(chunks[number]))
            counted[number] = ", ".join(name for name in COUNTED if CALLS[name])
            check(ways[number], count)
    medians = [statistics.median(values[repeats // 10 :]) for values in seconds]  # the first ones warm up
    what = f"{batch} x {count} at {start}"
    return [
        f"| {what} | {way.name} | {median * 1e3:.2f} | {median / medians[0]:.2f} | {count_} |"
        for way, median, count_ in zip(ways, medians, counted, strict=True)
    ]


def check(way: Contender, count: int) -> None:
    """SystemExit where what was just measured is not the way that the row names. Prompts have no graphs here."""
    if (count == 1 or way.claim != "graph:decode") and not CALLS[way.claim]:
        raise SystemExit(f"error: {way.name}: `{way.claim}` was not counted, but {dict(CALLS)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(circumstances("1 thread", device=options.device))
    if not options.device.startswith("cuda"):
        print("Decode graphs are not measured: they need a CUDA device, this is a run on a CPU.")
    print("\n| sequences x tokens | path | ms | of the first | counted |\n|---|---|---|---|---|")
    ways = contenders(options.device)
    for batch, count, start in BATCHES:
        print("\n".join(measure(ways, batch, count, start, options.repeats)))


if __name__ == "__main__":
    main()
