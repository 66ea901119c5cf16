"""How fast this worker computes, measured step by step: what a prompt's tokens and what a step of answers take.

    seconds of a step = those of its answers alone + of its prompt tokens: a part for the step, a part per token

Old steps count less and less. A worker under load is as slow as it then is, which is what placing wants to know.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from disagg.transceiver.wire.messages.rates import MeasuredRates

KEPT: Final = 0.98
"""What is left of a step's weight when another of its kind was measured: the last fifty count."""

MIN_SPREAD: Final = 0.2
"""Of the prompt tokens per step, standard deviation over mean, from which a step's own part can be told from theirs."""

MOST_OF_A_STEP: Final = 0.75
"""A quarter of what was measured is left to its tokens at least: a few noisy steps would say that they are free."""


@dataclass(slots=True)
class _Line:
    """Weighted sums of points (x, y), of which the later ones weigh more."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n, self.x, self.y = KEPT * self.n + 1, KEPT * self.x + x, KEPT * self.y + y
        self.xx, self.xy = KEPT * self.xx + x * x, KEPT * self.xy + x * y

    def fit(self, guess: float) -> tuple[float, float]:
        """(y at x = 0, y per x), neither below 0; the first is near `guess` where the points say nothing of it."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        variance, start = self.xx / self.n - mean_x**2, guess
        if variance >= (MIN_SPREAD * mean_x) ** 2:
            start = mean_y - (self.xy / self.n - mean_x * mean_y) / variance * mean_x
        start = min(max(start, 0.0), MOST_OF_A_STEP * mean_y)
        return start, (mean_y - start) / mean_x


class StepSpeeds:
    """`note` belongs to the model thread, `rates` to any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompts = _Line()
        self._answers: dict[int, _Line] = {}
        """Steps of answers alone, by the binary digits of their number: up to 1, 3, 7, 15 and so on."""
        self._is_warm: set[bool] = set()

    def note(self, seconds: float, num_prompt_tokens: int, num_answers: int) -> None:
        """One step took `seconds` for so many tokens of prompts and for one token of each of so many answers.

        The first of either kind is left out: it touches memory and code for the first time, and takes several times
        as long as any after it.
        """
        if seconds <= 0 or not num_prompt_tokens + num_answers:
            return
        if (kind := num_prompt_tokens > 0) not in self._is_warm:
            self._is_warm.add(kind)
            return
        with self._lock:
            if num_prompt_tokens:
                beside = self._seconds_of(num_answers)
                self._prompts.add(num_prompt_tokens, max(seconds - beside, seconds / 10))
            elif num_answers:
                self._answers.setdefault(num_answers.bit_length(), _Line()).add(num_answers, seconds)

    @property
    def rates(self) -> MeasuredRates:
        """What the lease says; what was not measured yet is 0 or empty."""
        with self._lock:
            guess = self._seconds_of(1)
            start, per_token = self._prompts.fit(guess) if self._prompts.n else (0.0, 0.0)
            steps = [(round(line.x / line.n), line.y / line.n) for _, line in sorted(self._answers.items())]
        return MeasuredRates(1 / per_token if per_token else 0.0, start, tuple(steps))

    def _seconds_of(self, num_answers: int) -> float:
        """What a step of these answers alone takes, as far as it is known: that of the nearest number measured."""
        if not num_answers or not self._answers:
            return 0.0
        kind = min(self._answers, key=lambda digits: abs(digits - num_answers.bit_length()))
        line = self._answers[kind]
        return line.y / line.n
