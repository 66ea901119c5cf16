"""The kernels, each on its own: time and the share of this device's copy bandwidth, measured in the same run.

    .venv/bin/python benchmarks/kernels.py [--device cpu|cuda] [--repeats 20] [--only NAME ...]

On CUDA the Triton kernels are measured at serving sizes, by the device's own clock over several calls in a row, so that
launching one is not counted while the one before it runs. On a CPU the torch reference is, at small sizes, for that is
what serves there. The column "served by" is counted, not assumed. `--only` takes names of kernels, as in `decode`,
`prefill`, `write`, `gather`. Prints a Markdown table and what repeats it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from disagg.bench.circumstances import circumstances
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS, backend
from disagg.kernels.qkv import head_norms, rotary
from disagg.kernels.scales import KVScales
from disagg.kernels.workspace import Workspace

BLOCK_SIZE = 16
NUM_LAYERS = 2  # so that a layer is a strided part of a slot, as when serving
# Calls between two events of the device. A launch takes the host 10 to 50 us, the shortest kernel here about as much:
# after the first the device always has the next one queued.
CALLS_PER_EVENT = 20


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
    copied_nbytes: int  # by each case that copies slots
    slot_nbytes: tuple[int, ...]
    eight_bits: tuple[torch.dtype, ...]  # stored KV, beside `dtype`


KIB, MIB = 1 << 10, 1 << 20
SLOTS = tuple(size * KIB for size in (16, 32, 64, 128))
FP8 = torch.float8_e4m3fn
GPU = Sizes(32, 8, 128, torch.bfloat16, 64, 8192, (4096, 1024, 256), 8192, 256 * MIB, SLOTS, (FP8, torch.int8))
CPU = Sizes(8, 2, 64, torch.float32, 8, 1024, (512, 128), 512, 8 * MIB, SLOTS, (FP8, torch.int8))


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

    def paged(
        self, runs: Sequence[tuple[int, int]], window: int | None, stored: torch.dtype
    ) -> tuple[torch.Tensor, PagedBatch]:
        """A layer's pool with room for `runs` (start, number of queries) in shuffled slots, and the batch."""
        sizes = self.sizes
        blocks = [-(-(start + number) // BLOCK_SIZE) for start, number in runs]
        order = iter(np.random.default_rng(0).permutation(np.arange(2, 2 + sum(blocks))).astype(np.int32))
        tables = [np.array([next(order) for _ in range(count)], np.int32) for count in blocks]
        shape = (2 + sum(blocks), NUM_LAYERS, 2, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
        pool = torch.ones(shape, device=self.device, dtype=torch.uint8 if stored.itemsize == 1 else stored)
        queries = tuple(QueryRun(table, start, n) for table, (start, n) in zip(tables, runs, strict=True))
        return pool.view(stored)[:, 1], PagedBatch(queries, BLOCK_SIZE, window, 0)

    def scales(self, stored: torch.dtype) -> KVScales | None:
        if stored.itemsize > 1:
            return None
        half = torch.full((self.sizes.num_kv_heads,), 0.05, device=self.device)
        return KVScales(half, half, torch.zeros((), dtype=torch.int64, device=self.device))

    def token_nbytes(self, stored: torch.dtype) -> int:
        """K and V of one token and layer."""
        return 2 * self.sizes.num_kv_heads * self.sizes.head_dim * stored.itemsize

    def attention(
        self, name: str, runs: Sequence[tuple[int, int]], window: int | None, kernel: str, stored: torch.dtype
    ) -> Case:
        pool, batch = self.paged(runs, window, stored)
        plan = ops.plan(batch, pool, self.sizes.dtype, Workspace())
        query = self.random(batch.num_queries, self.sizes.num_heads, self.sizes.head_dim)
        keys = sum(start + n if window is None else min(start + n, window + n) for start, n in runs)
        nbytes = keys * self.token_nbytes(stored) + 2 * query.nbytes
        scales = self.scales(stored)
        return Case(name, lambda: ops.paged_attention(query, pool, plan, scale=0.1, scales=scales), nbytes, kernel)

    def decode(self) -> Iterator[Case]:
        sizes = self.sizes
        runs = [(sizes.history - 1, 1)] * sizes.batch
        ways = [(window, sizes.dtype) for window in (None, *sizes.windows)]
        for window, stored in (*ways, *((None, stored) for stored in sizes.eight_bits)):
            what = "all" if window is None else f"a window of {window}"
            name = f"decode attention: {sizes.batch} sequences of {sizes.history}, {what}{_stored(stored)}"
            yield self.attention(name, runs, window, "decode_attention", stored)

    def prefill(self) -> Iterator[Case]:
        sizes = self.sizes
        ways = [(window, sizes.dtype) for window in (None, *sizes.windows)]
        for window, stored in (*ways, *((None, stored) for stored in sizes.eight_bits)):
            what = f", a window of {window}" if window else ""
            name = f"prefill attention: {sizes.prompt} tokens{what}{_stored(stored)}"
            yield self.attention(name, [(0, sizes.prompt)], window, "prefill_attention", stored)
        yield from self.unpaged_prefill()

    def unpaged_prefill(self) -> Iterator[Case]:
        """torch's own attention of the same shapes, over K and V that lie contiguous."""
        sizes = self.sizes
        q, k, v = (
            self.random(1, heads, sizes.prompt, sizes.head_dim)
            for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        )
        nbytes, sdpa = 2 * q.nbytes + k.nbytes + v.nbytes, functional.scaled_dot_product_attention
        yield Case("  torch SDPA, unpaged, the same", lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True), nbytes)
        at = torch.arange(sizes.prompt, device=self.device)
        for window in sizes.windows:
            near = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
            yield Case(
                f"  torch SDPA, unpaged, masked to a window of {window}",
                lambda near=near: sdpa(q, k, v, attn_mask=near, enable_gqa=True),  # type: ignore[misc]
                nbytes,
            )

    def write(self) -> Iterator[Case]:
        sizes = self.sizes
        key, value = (self.random(sizes.prompt, sizes.num_kv_heads, sizes.head_dim) for _ in range(2))
        qkv = self.random(sizes.prompt, (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim)
        gain = torch.ones(sizes.head_dim, device=self.device)
        norms = head_norms(gain, gain, None, epsilon=1e-6)
        angles = rotary(torch.arange(sizes.prompt, device=self.device), gain[: sizes.head_dim // 2] * 0.1)
        for stored in (sizes.dtype, *sizes.eight_bits):
            pool, batch = self.paged([(0, sizes.prompt)], None, stored)
            plan, scales = ops.plan(batch, pool, sizes.dtype, Workspace()), self.scales(stored)
            kept = sizes.prompt * self.token_nbytes(stored)
            yield Case(
                f"KV write: {sizes.prompt} tokens{_stored(stored)}",
                lambda pool=pool, plan=plan, scales=scales: ops.write_kv(pool, plan, key, value, scales=scales),  # type: ignore[misc]
                key.nbytes + value.nbytes + kept,
                "write_kv",
            )
            if not can_fuse(stored, self.device):
                continue
            yield Case(
                f"QKV preprocessing: {sizes.prompt} tokens{_stored(stored)}",
                lambda pool=pool, plan=plan, scales=scales: ops.preprocess_qkv(  # type: ignore[misc]
                    qkv, pool, plan, num_heads=sizes.num_heads, norms=norms, angles=angles, scales=scales
                ),
                qkv.nbytes + sizes.prompt * sizes.num_heads * sizes.head_dim * sizes.dtype.itemsize + kept,
                "preprocess_qkv",
            )

    def gather(self) -> Iterator[Case]:
        """Whole slots, of each size, to staging and back."""
        for nbytes in self.sizes.slot_nbytes:
            memory, slots, staging = self.slots(nbytes)
            both, size = 2 * staging.nbytes, f"{len(slots)} slots of {nbytes // KIB} KiB"
            arguments = (memory, slots, staging)
            yield Case(f"gather: {size}", lambda a=arguments: ops.gather_slots(*a), both, "gather_slots")  # type: ignore[misc]
            yield Case(f"scatter: {size}", lambda a=arguments: ops.scatter_slots(*a), both, "scatter_slots")  # type: ignore[misc]

    def slots(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory, every second slot of it in random order, and staging for these."""
        count = max(1, self.sizes.copied_nbytes // nbytes)
        memory = torch.zeros(2 * count, nbytes, dtype=torch.uint8, device=self.device)
        slots = torch.randperm(len(memory), device=self.device)[:count]
        return memory, slots, torch.zeros(count, nbytes, dtype=torch.uint8, device=self.device)

    def units(self) -> Iterator[Case]:
        """Between layouts: half of the heads, blocks of another size, another number format."""
        sizes = self.sizes
        block_nbytes = NUM_LAYERS * BLOCK_SIZE * self.token_nbytes(sizes.dtype)
        memory, slots, _ = self.slots(block_nbytes)
        shape = (len(memory), NUM_LAYERS, 2, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
        held, half = memory.view(sizes.dtype).view(shape), sizes.num_kv_heads // 2
        size = f"{len(slots)} slots of {block_nbytes // KIB} KiB"
        row = torch.arange(len(slots), device=self.device)
        at, to = (torch.stack([rows, torch.zeros_like(rows)], dim=1) for rows in (slots, row))
        part = torch.empty(len(slots), *shape[1:3], half, *shape[4:], dtype=sizes.dtype, device=self.device)
        yield self.copy(f"half of the heads: {size}", held[:, :, :, half:], at, part, to, BLOCK_SIZE)
        double = torch.empty(-(-len(slots) // 2), *shape[1:4], 2 * BLOCK_SIZE, sizes.head_dim, dtype=sizes.dtype)
        merged = torch.stack([row // 2, row % 2 * BLOCK_SIZE], dim=1)
        yield self.copy(f"blocks of {2 * BLOCK_SIZE}: {size}", held, at, double.to(self.device), merged, BLOCK_SIZE)
        narrow = torch.float16 if sizes.dtype == torch.bfloat16 else torch.bfloat16
        other = torch.empty(len(slots), *shape[1:], dtype=narrow, device=self.device)
        yield self.copy(f"converted to {_name(narrow)}: {size}", held, at, other, to, BLOCK_SIZE)
        eight = torch.empty(len(slots), *shape[1:], dtype=torch.int8, device=self.device)
        scales = torch.full(shape[1:4], 0.05, device=self.device)
        yield self.copy(f"converted to int8: {size}", held, at, eight, to, BLOCK_SIZE, scales)

    def copy(
        self,
        name: str,
        source: torch.Tensor,
        at: torch.Tensor,
        target: torch.Tensor,
        to: torch.Tensor,
        unit: int,
        scales: torch.Tensor | None = None,
    ) -> Case:
        count = len(at) * (source.shape[1] * 2 * source.shape[3] * unit * source.shape[5])
        nbytes = count * (source.element_size() + target.element_size())
        return Case(
            f"copy of units, {name}",
            lambda: ops.copy_units(source, at, target, to, unit, target_scales=scales),
            nbytes,
            "copy_units",
        )

    def cases(self, only: Sequence[str] = ()) -> Iterator[Case]:
        groups = {name: getattr(self, name) for name in GROUPS}
        for name in only or GROUPS:
            yield from groups[name]()


GROUPS = ("decode", "prefill", "write", "gather", "units")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored(dtype: torch.dtype) -> str:
    return f", stored as {_name(dtype)}" if dtype.itemsize == 1 else ""


def can_fuse(stored: torch.dtype, device: str) -> bool:
    """Whether the fused kernel stores this here: Triton's interpreter refuses fp8."""
    is_interpreted = getattr(backend(torch.device(device)), "INTERPRETED", False)
    return stored != FP8 or not is_interpreted


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median over `repeats` of one call, after two that compile and warm."""
    for _ in range(2):
        call()
    measure = _on_device if device == "cuda" else _on_host
    return statistics.median(measure(call) for _ in range(repeats))


def _on_host(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _on_device(call: Callable[[], object]) -> float:
    """Between two events around calls in a row: the host's launches overlap the kernels before them."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call()  # the device is busy when the first event is queued
    begun.record()
    for _ in range(CALLS_PER_EVENT):
        call()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3 / CALLS_PER_EVENT


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
    if case.kernel and not CALLS:
        raise SystemExit(f"error: {case.name}: nothing was counted, so nothing of ours ran")
    if case.kernel and any(name.startswith("native:") for name in CALLS):
        return "the compiled helper"
    return "Triton" if case.kernel and is_triton else "torch"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=(), metavar="NAME")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    peak = copy_bandwidth(options.repeats, options.device)
    print(circumstances("1 thread", device=options.device))
    print(f"\nA copy by torch moves {peak / 1e9:.0f} GB/s (read and written).\n")
    print("| what | served by | median us | GB/s | of a copy |\n|---|---|---|---|---|")
    for case in Bench(options.device).cases(options.only):
        who, took = served_by(case, options.device), seconds(case.call, options.repeats, options.device)
        speed = case.nbytes / took
        print(f"| {case.name} | {who} | {took * 1e6:.0f} | {speed / 1e9:.1f} | {speed / peak:.0%} |", flush=True)


if __name__ == "__main__":
    main()
