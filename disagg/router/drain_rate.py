"""How fast a queue drains, smoothed over the last seconds, and how long a given amount will take. Pure."""

from __future__ import annotations

import math
from typing import Final

SMOOTHED_S: Final = 20.0
"""What left so long ago counts for a third: some answers of ordinary length, so that one of them does not decide."""
SHORTEST_S: Final = 1.0
"""The smallest whole second that a Retry-After header can say."""
LONGEST_S: Final = 60.0
"""A client told to come back later than this might as well not; a queue that stands still may move by then."""


class DrainRate:
    """An exponentially weighted rate. Times never go back."""

    def __init__(self) -> None:
        self._mass = 0.0
        self._at: float | None = None
        self._since = 0.0

    def note(self, amount: float, now: float) -> None:
        """So much left."""
        if self._at is None:
            self._since = now
        self._mass = self._decayed(now) + amount
        self._at = now

    def per_second(self, now: float) -> float:
        """0 where nothing ever left. What was seen for less than `SMOOTHED_S` counts over the time it was seen for."""
        seen_s = max(now - self._since, SHORTEST_S)
        return self._decayed(now) / (SMOOTHED_S * -math.expm1(-seen_s / SMOOTHED_S))

    def seconds_for(self, amount: float, now: float) -> float:
        """How long until `amount` has left: a time that a Retry-After header can say."""
        rate = self.per_second(now)
        return min(max(amount / rate, SHORTEST_S), LONGEST_S) if rate > 0 else SHORTEST_S

    def _decayed(self, now: float) -> float:
        return 0.0 if self._at is None else self._mass * math.exp((self._at - now) / SMOOTHED_S)
