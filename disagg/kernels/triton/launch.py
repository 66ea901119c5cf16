"""How the attention kernels are cut for a device: tile sizes, splits and the memory that splits need."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch

# Programs in flight per multiprocessor that hide memory latency; more splits than that only add merging.
PROGRAMS_PER_PROCESSOR: Final = 4
# Chunks of keys that a split must have to be worth its part of the merge.
MIN_CHUNKS_PER_SPLIT: Final = 2
# The interpreter has no processors: as many as keep the tests' splits interesting.
INTERPRETED_PROCESSORS: Final = 8
# tl.dot takes no smaller operand.
MIN_DOT: Final = 16
# Elements of K that one iteration loads: with V and a second stage about 64 KiB of 2-byte numbers, of an H200's 227.
CHUNK_ELEMENTS: Final = 8192
CHUNK_KEYS: Final = 64
# By bytes per element: rows of a prefill tile, and the largest accumulator (rows * head_dim) that 4 warps hold. With
# them ptxas reports no spilled registers for sm_90; float32 products take no tensor cores and more registers.
TILE_ROWS: Final = {2: 64, 4: 32}
ELEMENTS_OF_4_WARPS: Final = {2: 8192, 4: 1024}
MAX_TILE_BYTES: Final = 32 * 1024  # of the accumulator of 8 warps, counted in the queries' dtype


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Cut:
    """Queries and rows (queries times query heads per kv head, padded) of a tile; keys per iteration."""

    num_queries: int
    rows: int
    keys: int
    padded_dim: int
    num_warps: int


def cut(*, head_dim: int, heads_per_kv: int, itemsize: int, decode: bool) -> Cut:
    """How a decode batch (tiles of one query) or a prefill chunk is cut."""
    padded = max(MIN_DOT, power_of_two(head_dim))
    keys = min(CHUNK_KEYS, max(MIN_DOT, CHUNK_ELEMENTS * 2 // itemsize // padded))
    wanted = 1 if decode else min(TILE_ROWS[itemsize], MAX_TILE_BYTES // (padded * itemsize))
    rows = max(MIN_DOT, power_of_two(heads_per_kv), wanted)
    num_warps = 4 if rows * padded <= ELEMENTS_OF_4_WARPS[itemsize] else 8
    return Cut(1 if decode else rows // heads_per_kv, rows, keys, padded, num_warps)


def num_splits(*, num_programs: int, num_keys: int, chunk_keys: int, num_processors: int) -> int:
    """Splits per tile: enough programs to fill the device, none with less than its minimum of chunks.

    `num_keys` is what a decode query attends to at most, so a windowed layer's splits follow its window.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // max(num_programs, 1))
    return max(1, min(wanted, -(-num_keys // chunk_keys) // MIN_CHUNKS_PER_SPLIT))


@dataclass(frozen=True, slots=True)
class SplitSpace:
    """float32 partial results of `[num_tiles, num_heads, num_splits]`, laid out in one buffer: outs, maxima, sums.

    Each begins at 16 bytes: kernels are compiled for aligned pointers, and once more for others.
    """

    num_parts: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of outs, maxima and sums, with what aligns the next: what is counted is what is cut."""
        outs, column = (-(-count // 4) * 4 for count in (self.num_parts * self.head_dim, self.num_parts))
        return outs, column, column

    @property
    def num_elements(self) -> int:
        return sum(self.sizes)

    def cut(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`buffer` `[num_elements]` as partial outs, maxima and sums."""
        outs, maxima, sums = torch.split(buffer, list(self.sizes))
        return outs[: self.num_parts * self.head_dim], maxima[: self.num_parts], sums[: self.num_parts]


@functools.cache
def num_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
