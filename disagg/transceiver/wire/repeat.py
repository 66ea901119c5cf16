"""When to say an unanswered message again: after 0.2 s, doubling to 2 s, until it is stopped."""

from __future__ import annotations

from disagg.transceiver.wire.timing import REPEAT_FIRST_S, REPEAT_MAX_S


class Repeat:
    """One timer. `at` is the time of the next repeat, None when nothing is unanswered."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._delay = REPEAT_FIRST_S

    def start(self, now: float) -> None:
        """Something was said just now. Starts the doubling anew."""
        self._delay = REPEAT_FIRST_S
        self.at = now + self._delay

    def stop(self) -> None:
        self.at = None

    def take(self, now: float) -> bool:
        """Is a repeat due? If so the next one is set, always later than `now`."""
        if self.at is None or now < self.at:
            return False
        self._delay = min(2 * self._delay, REPEAT_MAX_S)
        self.at = now + self._delay
        return True
