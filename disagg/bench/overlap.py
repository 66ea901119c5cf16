"""What overlapping buys: a transfer beside the prompt's computation, and the same one after it, in turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.bench.cases import Case
from disagg.bench.chunked import NUM_CHUNKS, WINDOW_CHUNKS, name_of
from disagg.bench.pair import Pair

ALLOWANCE: Final = 1.3
SLACK_S: Final = 0.005
"""Exposed time may be `ALLOWANCE` times what the last chunk's bytes take, and a few messages."""

FULL_SHARE: Final = 0.25
"""What a model of full attention, in eight equal chunks, may expose of the same transfer after prefill."""

WARMUP: Final = 2


@dataclass(frozen=True, slots=True)
class Overlap:
    """One plane and model. Times are medians in seconds; `nbytes` moved, `last_nbytes` final in the last chunk only."""

    plane: str
    model: str
    nbytes: int
    last_nbytes: int
    exposed_s: float
    exposed_after_prefill_s: float

    @property
    def gbps(self) -> float:
        """Of the transfer that waited for the prompt."""
        return self.nbytes / self.exposed_after_prefill_s / 1e9

    @property
    def bound_s(self) -> float:
        return ALLOWANCE * self.last_nbytes / (self.gbps * 1e9) + SLACK_S

    @property
    def share(self) -> float:
        return self.exposed_s / self.exposed_after_prefill_s

    @property
    def is_held(self) -> bool:
        return self.exposed_s <= self.bound_s and (self.model != "full" or self.share <= FULL_SHARE)


def measure_overlap(case: Case, plane: str, model: str, *, chunk_s: float, rounds: int, seed: int) -> Overlap:
    """Both ways in turns, every byte compared. Raises `BenchError`."""
    pairs: list[Pair] = []
    try:
        pairs.extend(Pair(name_of(plane, model, overlapped, chunk_s), True, case) for overlapped in (True, False))
        exposed: list[list[float]] = [[], []]
        for number in range(WARMUP + rounds):
            for pair, times in zip(pairs, exposed, strict=True):
                sample = pair.repeat(number, np.random.default_rng([seed, number]))
                if number >= WARMUP:
                    times.append(sample.exposed_s)
    finally:
        for pair in pairs:
            pair.close()
    per_chunk = case.nbytes // NUM_CHUNKS
    moved = WINDOW_CHUNKS * per_chunk if model == "windowed" else case.nbytes
    return Overlap(plane, model, moved, per_chunk, *map(statistics.median, exposed))
