"""What is moved: KV of one prompt, named by how an engine with one tensor per layer would hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MIN_POOL_NBYTES, MAX_POOL_NBYTES = 64 << 20, 512 << 20
"""Memory per side that blocks are scattered over: twice a CPU's cache at least, 2.5 times the largest case at most."""

NUM_RESERVED: Final = 2  # NULL and TRASH of a pool


@dataclass(frozen=True, slots=True)
class Case:
    """`num_blocks` blocks of `num_layers` layers, `region_nbytes` of each layer. K and V of a block lie together.

    As *regions*, layer by layer, it is num_layers x num_blocks pieces: what engines with per-layer tensors must move.
    As *slots*, which is how disagg lays its cache out, it is num_blocks pieces of all layers.
    """

    name: str
    num_layers: int
    num_blocks: int
    region_nbytes: int

    @property
    def slot_nbytes(self) -> int:
        return self.num_layers * self.region_nbytes

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.slot_nbytes

    @property
    def pool_nbytes(self) -> int:
        return min(max(4 * self.nbytes, MIN_POOL_NBYTES), MAX_POOL_NBYTES)

    @property
    def pool_blocks(self) -> int:
        """Blocks that fit a pool, the reserved ones included."""
        return self.pool_nbytes // self.slot_nbytes

    def draw_blocks(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Distinct random blocks, int64 `[num_blocks]`."""
        return NUM_RESERVED + rng.permutation(self.pool_blocks - NUM_RESERVED)[: self.num_blocks]

    def pieces(self, blocks: npt.NDArray[np.int64], by_layer: bool) -> tuple[npt.NDArray[np.int64], int]:
        """Numbers of the pieces of `blocks` in a pool cut into equal pieces, and the bytes of one."""
        if not by_layer:
            return blocks, self.slot_nbytes
        first = np.arange(self.num_layers, dtype=np.int64)[:, None] * self.pool_blocks
        return (first + blocks[None, :]).ravel(), self.region_nbytes


CASES: Final = {
    case.name: case
    for case in (
        Case("a", 32, 64, 64 << 10),  # 128 MiB: 1024 tokens of an 8B model with grouped heads
        Case("b", 26, 512, 16 << 10),  # 208 MiB: 8192 tokens of a small model, many small pieces
        Case("c", 26, 8, 16 << 10),  # 3.3 MiB: a short prompt, where set-up counts
        Case("d", 1, 64, 2 << 20),  # 128 MiB in 64 pieces for everybody
    )
}
