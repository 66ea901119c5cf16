"""How fast workers and links are, as they measured it themselves."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

StepSeconds = tuple[tuple[int, float], ...]
"""(answers in one step, seconds of that step), by ascending number of answers."""


@dataclass(frozen=True, slots=True)
class Rates:
    """`prefill_tokens_per_s`: of prompts computed there. `step_s`: what a step of answers alone takes, by their number.
    `prompt_step_s`: what a step with prompt tokens takes beside them.

    Raises ValueError for a rate or a time that is not above 0, and for numbers of answers that do not ascend from 1 on.
    """

    prefill_tokens_per_s: float
    step_s: StepSeconds
    prompt_step_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.prefill_tokens_per_s < math.inf:
            raise ValueError(f"prefill_tokens_per_s: {self.prefill_tokens_per_s}, expected a number above 0")
        if not self.step_s or self.step_s[0][0] < 1 or any(a >= b for (a, _), (b, _) in pairwise(self.step_s)):
            raise ValueError(f"step_s: {self.step_s}, expected ascending numbers of answers from 1 on")
        if not all(0 < seconds < math.inf for _, seconds in self.step_s):
            raise ValueError(f"step_s: {self.step_s}, expected seconds above 0")
        if not 0 <= self.prompt_step_s < math.inf:
            raise ValueError(f"prompt_step_s: {self.prompt_step_s}, expected a duration")

    def step_seconds(self, num_answers: int) -> float:
        """Of one step with so many answers: on a line between two that were measured, in proportion beyond the last."""
        points = self.step_s
        place = bisect_left(points, (num_answers,))
        if place == len(points):
            most, seconds = points[-1]
            return seconds * num_answers / most
        count, seconds = points[place]
        if place == 0 or count == num_answers:
            return seconds
        fewer, less = points[place - 1]
        return less + (seconds - less) * (num_answers - fewer) / (count - fewer)

    def answer_seconds(self, num_answers: int) -> float:
        """What one token more of another answer costs: its own step, and what `num_answers` others wait longer.

        Steps were measured at different moments: one with more answers may have been the faster. That is no gain.
        """
        alone = self.step_seconds(num_answers + 1)
        longer = max(0.0, alone - self.step_seconds(num_answers)) if num_answers else 0.0
        return alone + num_answers * longer


@dataclass(frozen=True, slots=True)
class LinkRate:
    """What moves KV from one worker to another. `latency_s`: of a transfer, whatever its size.

    `hands_over`, `fetches`: whether both ends serve transfers of the purposes `handoff` and `prefix`.
    """

    gb_per_s: float
    latency_s: float = 0.0
    hands_over: bool = True
    fetches: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.gb_per_s < math.inf:
            raise ValueError(f"gb_per_s: {self.gb_per_s}, expected a number above 0")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"latency_s: {self.latency_s}, expected a duration")

    def seconds(self, nbytes: int) -> float:
        """For one transfer; nothing is moved, and nothing waited for, where there are no bytes to move."""
        return self.latency_s + nbytes / (self.gb_per_s * 1e9) if nbytes else 0.0


Links = Callable[[str, str], LinkRate | None]
"""(source, sink) -> the link over which KV can go from one to the other now, None without one."""
