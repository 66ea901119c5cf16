"""Sides whose prompt is still being computed when FETCH comes: chunks of it become final one after the other.

The model's time is slept, not computed: what is measured is the transfer, on cores that the model does not use.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from disagg.bench.side import ContenderSide
from disagg.bench.workers import BLOCK_SIZE, FIRST_TOKEN, WorkerDestination, WorkerSide, WorkerSource
from disagg.transceiver.layout.slice_size import units_per_slice
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.protocol.events import PromptComputed, UnitsFinal

PREFIX: Final = "chunked:"
NUM_CHUNKS: Final = 8
WINDOW_CHUNKS: Final = 2
"""Of a windowed model: half of what it moves becomes final in the last chunk."""


def name_of(plane: str, model: str, overlapped: bool, chunk_s: float) -> str:
    """How a side is asked for over a command line. `model`: full or windowed."""
    return f"{PREFIX}{plane}:{model}:{'on' if overlapped else 'off'}:{chunk_s}"


def make_chunked_side(name: str, is_source: bool) -> ContenderSide:
    """The side that `name_of` named."""
    plane, model, overlapped, chunk_s = name.removeprefix(PREFIX).split(":")
    if is_source:
        return ChunkedSource(plane, model, overlapped == "on", float(chunk_s))
    return ChunkedDestination(plane, model)


class _Chunked(WorkerSide):
    model: str

    @property
    def window(self) -> int | None:
        if self.model == "full":
            return None
        return self.case.num_blocks // NUM_CHUNKS * WINDOW_CHUNKS * BLOCK_SIZE


class ChunkedDestination(_Chunked, WorkerDestination):
    def __init__(self, plane: str, model: str) -> None:
        super().__init__(plane, digests=True)
        self.model = model


class ChunkedSource(_Chunked, WorkerSource):
    """Reports equal chunks as they become final, `chunk_s` apart, or (`overlapped` False) all after the last."""

    def __init__(self, plane: str, model: str, overlapped: bool, chunk_s: float) -> None:
        super().__init__(plane, digests=True)
        self.model, self._overlapped, self._chunk_s = model, overlapped, chunk_s
        self.computed_at = 0.0

    async def prepare(self, number: int, mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> None:
        del theirs
        self._begin(number)
        self._units = self._sources(mine)

    async def move(self) -> int:
        step = self.case.num_blocks // NUM_CHUNKS
        for first in range(0, self.case.num_blocks, step):
            await asyncio.sleep(self._chunk_s)
            self.computed_at = time.monotonic()
            if self._overlapped:
                await self._announce(self._units[first : first + step])
        if not self._overlapped:
            await self._announce(self._units)
        self.sending.feed(self.attempt, PromptComputed(1, FIRST_TOKEN))
        return await super().move()

    async def _announce(self, units: Sequence[SourceUnit]) -> None:
        """As a worker does with what its engine reports."""
        count = units_per_slice((self.case.slot_nbytes,))
        for first in range(0, len(units), count):
            hashed = await self.landing.digest_units(units[first : first + count])
            self.sending.feed(self.attempt, UnitsFinal(1, hashed))
