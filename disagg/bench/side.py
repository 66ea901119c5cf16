"""One of the two processes of a contender: what the controller may ask of it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from disagg.bench.cases import Case
from disagg.kernels.digest import digest

Bytes = npt.NDArray[np.uint8]
FINITE_BITS = np.uint8(0x3F)  # no float of any width whose bytes are all below 0x40 is Inf or NaN
PAGE_WORDS = 512  # of 8 bytes: one line in 64 is touched, so that refreshing warms no cache for the transfer


class ContenderSide(ABC):
    """A contender's source or destination. `memory`: uint8 `[pool_nbytes]` or fewer; `by_layer`: how it is cut."""

    by_layer: bool
    memory: Bytes

    def __init__(self, is_source: bool, plane: str) -> None:
        self.is_source, self.plane = is_source, plane
        self.case: Case

    @abstractmethod
    async def open(self, case: Case, secret: bytes) -> dict[str, Any]:
        """Make the memory for `case`; what the other side must know to connect. `secret` is for both sides."""

    async def connect(self, other: dict[str, Any]) -> None:
        """Set up everything that is paid once per pair. `other`: what the other side's `open` returned."""
        return

    @abstractmethod
    async def prepare(self, number: int, mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> None:
        """What a worker has done before FETCH: blocks are known, sources are hashed where digests are on."""

    @abstractmethod
    async def move(self) -> int:
        """Do this side's part; on the destination returns when all bytes lie there. Returns operations."""

    async def close(self) -> None:
        """Give up what `open` and `connect` made."""
        return

    # --- the same for everybody -------------------------------------------------------------------------------

    def fill(self, seed: int) -> None:
        """Every piece different from every other, and finite as whatever type."""
        rng = np.random.default_rng(seed)
        for start in range(0, self.memory.size, 1 << 24):
            part = self.memory[start : start + (1 << 24)]
            np.bitwise_and(np.frombuffer(rng.bytes(part.size), dtype=np.uint8), FINITE_BITS, out=part)

    def rows(self, blocks: npt.NDArray[np.int64]) -> tuple[Bytes, npt.NDArray[np.int64]]:
        """This side's memory as pieces `[n, nbytes]`, and which of them hold `blocks`."""
        numbers, nbytes = self.case.pieces(blocks, self.by_layer)
        count = self.case.pool_blocks * (self.case.num_layers if self.by_layer else 1)
        return self.memory[: count * nbytes].reshape(count, nbytes), numbers

    def refresh(self, blocks: npt.NDArray[np.int64], number: int) -> None:
        """Change 8 bytes in each 4 KiB, and the last: what an earlier round left somewhere passes for nothing now."""
        rows, numbers = self.rows(blocks)
        words = rows.view(np.uint64)
        changed = np.append(np.arange(0, words.shape[1], PAGE_WORDS), words.shape[1] - 1)
        key = np.random.default_rng(number).integers(1, FINITE_BITS, 8, dtype=np.uint8, endpoint=True)
        words[np.ix_(numbers, changed)] ^= key.view(np.uint64)[0]

    def scribble(self, blocks: npt.NDArray[np.int64]) -> None:
        """So that a piece that nothing was copied to shows at once."""
        rows, numbers = self.rows(blocks)
        rows[numbers, :8] = 0xFF
        rows[numbers, -8:] = 0xFF

    def hashes(self, blocks: npt.NDArray[np.int64]) -> list[int]:
        """Of each piece in order, every byte counted."""
        rows, numbers = self.rows(blocks)
        return [digest(rows[number]) for number in numbers.tolist()]


async def wait_until(instant: float) -> None:
    """`instant` on CLOCK_MONOTONIC, which all processes of a host share."""
    await asyncio.sleep(max(0.0, instant - time.monotonic() - 0.001))
    while time.monotonic() < instant:
        pass
