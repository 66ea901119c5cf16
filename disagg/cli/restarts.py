"""When a process that died may start again. Pure: time arrives as an argument."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_RESTARTS: Final = 5  # in WINDOW_S; a process that dies more often will not heal by starting it once more
WINDOW_S: Final = 60.0
FIRST_DELAY_S: Final = 0.5  # short, so that one accident costs little; doubled, so that a loop costs little CPU


class Restarts:
    """The restarts of one process within the last minute."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def next_delay_s(self, now: float) -> float | None:
        """Count a death at `now`: seconds to wait before the restart, or None when there were too many."""
        while self._times and self._times[0] <= now - WINDOW_S:
            self._times.popleft()
        if len(self._times) == MAX_RESTARTS:
            return None
        self._times.append(now)
        return FIRST_DELAY_S * 2.0 ** (len(self._times) - 1)
