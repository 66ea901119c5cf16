"""How fast a worker computes, as it measured it itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from disagg.transceiver.wire.messages.ranges import MAX_INT32, check_int, check_size, fail

MAX_STEP_POINTS: Final = 64
"""A worker tells one per binary digit of the number of answers."""


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """`prompt_step_s`: what a step with prompt tokens takes beside its tokens. `step_s`: (answers, seconds of a step of
    so many), ascending. 0 and empty: not measured yet.
    """

    prefill_tokens_per_s: float = 0.0
    prompt_step_s: float = 0.0
    step_s: Annotated[tuple[tuple[int, float], ...], MAX_STEP_POINTS] = ()

    def __post_init__(self) -> None:
        check_size("step_s", self.step_s, MAX_STEP_POINTS)
        for name in ("prefill_tokens_per_s", "prompt_step_s"):
            if not 0 <= getattr(self, name) < math.inf:
                fail(name, getattr(self, name), "a number from 0 on")
        for count, seconds in self.step_s:
            check_int("step_s", count, 1, MAX_INT32)
            if not 0 < seconds < math.inf:
                fail("step_s", seconds, "seconds above 0")
        if any(a >= b for (a, _), (b, _) in pairwise(self.step_s)):
            fail("step_s", self.step_s, "ascending numbers of answers")
