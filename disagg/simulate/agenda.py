"""What happens next: calls by the moment they are due, those of one moment in the order in which they were noted."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Agenda:
    """A simulated clock. `now` is in seconds and never goes back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_done = 0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._num_noted = 0

    def at(self, moment: float, call: Callable[[], object]) -> None:
        """Make the call at this moment, at once where it is past."""
        self._num_noted += 1
        heapq.heappush(self._due, (max(moment, self.now), self._num_noted, call))

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        self.at(self.now + seconds, call)

    def run(self) -> None:
        """Until nothing is noted any more."""
        due = self._due
        while due:
            self.now, _, call = heapq.heappop(due)
            self.num_done += 1
            call()
