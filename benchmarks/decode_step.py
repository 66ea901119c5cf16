"""A step of the bundled model on its fast paths: fused QKV against transformers' forward, graphs against eager.

    .venv/bin/python benchmarks/decode_step.py [--device cpu|cuda] [--repeats 100]

Contenders take turns, step by step, on the same sequences. Graphs are measured on CUDA only, where they exist; the
column "counted" is what the dispatcher counted while that row was measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from disagg.cache.cache import KVCache
from disagg.cache.layout import derive_layout
from disagg.engine.engine import StepRunner
from disagg.engine.fused_qkv import fuse
from disagg.engine.graphs import DecodeGraphs, GraphRunner
from disagg.engine.graphs_cuda import CudaGraphs
from disagg.engine.model import LoadedModel, load_model
from disagg.engine.probe import probe
from disagg.engine.runner import Chunk, Runner
from disagg.kernels.dispatch import CALLS, FUSED_VARIABLE

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
    found = [_contender("transformers' forward", plain), _contender("fused QKV", fused)]
    if fused.device.type == "cuda":
        found.append(_contender("fused QKV, graphs", fused, graphs=True))
    return found


def _load(device: str, *, is_fused: bool) -> LoadedModel:
    os.environ[FUSED_VARIABLE] = "off"
    model = load_model(Path(str(files("disagg") / "demo_model")), dtype="float32", device=device)
    if is_fused:
        fuse(model.module, probe(model.module, device))
    return model


def _contender(name: str, model: LoadedModel, *, graphs: bool = False) -> Contender:
    layout = derive_layout(model.layers, block_size=16, max_model_len=MAX_MODEL_LEN)
    cache = KVCache(layout, [1200] * layout.num_pools, str(model.device))
    runner: StepRunner = Runner(model, cache)
    if graphs:
        maker = CudaGraphs(model.device)
        captured = DecodeGraphs(model, cache, maker, max_num_seqs=32, max_model_len=MAX_MODEL_LEN)
        captured.capture()
        runner = GraphRunner(runner, captured)
    return Contender(name, runner, cache, model.device)


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
    medians = [statistics.median(values[repeats // 10 :]) for values in seconds]  # the first ones warm up
    what = f"{batch} x {count} at {start}"
    return [
        f"| {what} | {way.name} | {median * 1e3:.2f} | {median / medians[0]:.2f} | {count_} |"
        for way, median, count_ in zip(ways, medians, counted, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()  # noqa: S607
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"`{shlex.join(['python', *sys.argv])}`, commit {commit}, {machine}, {os.cpu_count()} cores, load {load}")
    if not options.device.startswith("cuda"):
        print("Decode graphs are not measured: they need a CUDA device, this is a run on a CPU.")
    print("\n| sequences x tokens | path | ms | of the first | counted |\n|---|---|---|---|---|")
    ways = contenders(options.device)
    for batch, count, start in BATCHES:
        print("\n".join(measure(ways, batch, count, start, options.repeats)))


if __name__ == "__main__":
    main()
