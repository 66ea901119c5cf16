"""The kernels, each on its own: time and the share of this device's copy bandwidth, measured in the same run.

    .venv/bin/python benchmarks/kernels.py [--device cpu|cuda] [--repeats 20]

On CUDA the Triton kernels are measured at serving sizes; on a CPU the torch reference is, at small ones, for that is
what serves there. The column "served by" is counted, not assumed. Prints a Markdown table and what repeats it.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS
from disagg.kernels.qkv import head_norms, rotary
from disagg.kernels.workspace import Workspace

BLOCK_SIZE = 16
NUM_LAYERS = 2  # so that a layer is a strided part of a slot, as when serving


@dataclass(frozen=True, slots=True)
class Sizes:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int
    history: int  # tokens before each decode query
    windows: tuple[int, ...]
    prompt: int
    copied_slots: int


GPU = Sizes(32, 8, 128, torch.bfloat16, 64, 8192, (4096, 1024, 256), 8192, 4096)
CPU = Sizes(8, 2, 64, torch.float32, 8, 1024, (512, 128), 512, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """`call` does it once. `nbytes`: what it must read and write at least. `kernel`: a name that `CALLS` counts."""

    name: str
    call: Callable[[], object]
    nbytes: int
    kernel: str = ""


class Bench:
    """Builds the cases for a device."""

    def __init__(self, device: str) -> None:
        self.device, self.sizes = device, GPU if device == "cuda" else CPU

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.sizes.dtype)

    def paged(self, runs: list[tuple[int, int]], window: int | None) -> tuple[torch.Tensor, PagedBatch]:
        """A layer's pool with room for `runs` (start, number of queries) in shuffled slots, and the batch."""
        sizes = self.sizes
        blocks = [-(-(start + number) // BLOCK_SIZE) for start, number in runs]
        order = iter(np.random.default_rng(0).permutation(np.arange(2, 2 + sum(blocks))).astype(np.int32))
        tables = [np.array([next(order) for _ in range(count)], np.int32) for count in blocks]
        shape = (2 + sum(blocks), NUM_LAYERS, 2, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
        pool = torch.full(shape, 0.1, device=self.device, dtype=sizes.dtype)[:, 1]
        queries = tuple(QueryRun(table, start, n) for table, (start, n) in zip(tables, runs, strict=True))
        return pool, PagedBatch(queries, BLOCK_SIZE, window, 0)

    def token_nbytes(self) -> int:
        """K and V of one token and layer."""
        return 2 * self.sizes.num_kv_heads * self.sizes.head_dim * self.sizes.dtype.itemsize

    def attention(self, name: str, runs: list[tuple[int, int]], window: int | None, kernel: str) -> Case:
        pool, batch = self.paged(runs, window)
        plan = ops.plan(batch, pool, self.sizes.dtype, Workspace())
        query = self.random(batch.num_queries, self.sizes.num_heads, self.sizes.head_dim)
        keys = sum(start + n if window is None else min(start + n, window + n) for start, n in runs)
        nbytes = keys * self.token_nbytes() + 2 * query.nbytes
        return Case(name, lambda: ops.paged_attention(query, pool, plan, scale=0.1), nbytes, kernel)

    def decode(self) -> Iterator[Case]:
        sizes = self.sizes
        runs = [(sizes.history - 1, 1)] * sizes.batch
        for window in (None, *sizes.windows):
            what = "all" if window is None else f"a window of {window}"
            name = f"decode attention: {sizes.batch} sequences of {sizes.history}, {what}"
            yield self.attention(name, runs, window, "decode_attention")

    def prefill(self) -> Iterator[Case]:
        sizes = self.sizes
        for window in (None, sizes.windows[-1]):
            name = f"prefill attention: {sizes.prompt} tokens" + (f", a window of {window}" if window else "")
            yield self.attention(name, [(0, sizes.prompt)], window, "prefill_attention")
        q, k, v = (
            self.random(1, heads, sizes.prompt, sizes.head_dim)
            for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        )
        nbytes = 2 * q.nbytes + k.nbytes + v.nbytes
        sdpa = functional.scaled_dot_product_attention
        yield Case("  torch SDPA, unpaged, the same", lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True), nbytes)

    def writes(self) -> Iterator[Case]:
        sizes = self.sizes
        pool, batch = self.paged([(0, sizes.prompt)], None)
        plan = ops.plan(batch, pool, sizes.dtype, Workspace())
        key, value = (self.random(sizes.prompt, sizes.num_kv_heads, sizes.head_dim) for _ in range(2))
        name = f"KV write: {sizes.prompt} tokens"
        yield Case(name, lambda: ops.write_kv(pool, plan, key, value), 2 * (key.nbytes + value.nbytes), "write_kv")
        qkv = self.random(sizes.prompt, (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim)
        gain = torch.ones(sizes.head_dim, device=self.device)
        norms = head_norms(gain, gain, None, epsilon=1e-6)
        angles = rotary(torch.arange(sizes.prompt, device=self.device), gain[: sizes.head_dim // 2] * 0.1)
        yield Case(
            f"QKV preprocessing: {sizes.prompt} tokens",
            lambda: ops.preprocess_qkv(qkv, pool, plan, num_heads=sizes.num_heads, norms=norms, angles=angles),
            2 * qkv.nbytes,
            "preprocess_qkv",
        )

    def copies(self) -> Iterator[Case]:
        sizes = self.sizes
        nbytes = NUM_LAYERS * BLOCK_SIZE * self.token_nbytes()
        memory = torch.zeros(2 * sizes.copied_slots, nbytes, dtype=torch.uint8, device=self.device)
        slots = torch.randperm(len(memory), device=self.device)[: sizes.copied_slots]
        staging = torch.zeros(len(slots), nbytes, dtype=torch.uint8, device=self.device)
        both, size = 2 * staging.nbytes, f"{len(slots)} slots of {nbytes >> 10} KiB"
        yield Case(f"gather: {size}", lambda: ops.gather_slots(memory, slots, staging), both, "gather_slots")
        yield Case(f"scatter: {size}", lambda: ops.scatter_slots(memory, slots, staging), both, "scatter_slots")
        shape = (len(memory), NUM_LAYERS, 2, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
        held, half = memory.view(sizes.dtype).view(shape), sizes.num_kv_heads // 2
        units = torch.empty(len(slots), *shape[1:3], half, *shape[4:], dtype=sizes.dtype, device=self.device)
        at = torch.stack([slots, torch.zeros_like(slots)], dim=1)
        to = torch.stack([torch.arange(len(slots), device=self.device), torch.zeros_like(slots)], dim=1)
        yield Case(
            f"gather of half the heads: {size}",
            lambda: ops.copy_units(held[:, :, :, half:], at, units, to, BLOCK_SIZE),
            2 * units.nbytes,
            "copy_units",
        )

    def cases(self) -> Iterator[Case]:
        for group in (self.decode, self.prefill, self.writes, self.copies):
            yield from group()


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median over `repeats`, after two calls that compile and warm."""
    times = []
    for number in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth(repeats: int, device: str) -> float:
    """Bytes read and written per second by torch's own copy, of more than any cache holds."""
    source = torch.zeros((1 << 30) if device == "cuda" else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats, device)


def served_by(case: Case, device: str) -> str:
    """Whose counters the call moved. On CUDA a fall-back to torch is an error, not a slow row."""
    CALLS.clear()
    case.call()
    is_triton = any(name.startswith(f"kernel:{case.kernel}") for name in CALLS)
    if case.kernel and device == "cuda" and not is_triton:
        raise SystemExit(f"error: {case.name}: kernel {case.kernel} did not run, but {dict(CALLS)}")
    return "Triton" if case.kernel and is_triton else "torch"


def circumstances(device: str) -> str:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"  # noqa: S603
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"1 thread of {platform.machine()}, the torch reference"
    )
    command = shlex.join(["python", *sys.argv])
    return f"`{command}`, commit {commit}, {where}, torch {torch.__version__}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = copy_bandwidth(options.repeats, options.device)
    print(circumstances(options.device))
    print(f"\nA copy by torch moves {peak / 1e9:.0f} GB/s (read and written).\n")
    print("| what | served by | median us | GB/s | of a copy |\n|---|---|---|---|---|")
    for case in Bench(options.device).cases():
        who, took = served_by(case, options.device), seconds(case.call, options.repeats, options.device)
        speed = case.nbytes / took
        print(f"| {case.name} | {who} | {took * 1e6:.0f} | {speed / 1e9:.1f} | {speed / peak:.0%} |", flush=True)


if __name__ == "__main__":
    main()
