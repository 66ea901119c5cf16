"""How fast a link is, by the transfers that used it. Pure: times are arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

KEPT: Final = 0.9
"""What is left of a transfer's weight when another ended: the last ten count."""


@dataclass(slots=True)
class BusyTime:
    """Seconds during which at least one job of a transfer ran."""

    seconds: float = 0.0
    num_running: int = field(default=0)
    _since: float = field(default=0.0)

    def begin(self, now: float) -> None:
        if not self.num_running:
            self._since = now
        self.num_running += 1

    def end(self, now: float) -> None:
        self.num_running -= 1
        if not self.num_running:
            self.seconds += now - self._since


class LinkMeter:
    """`gb_per_s` of the last transfers, the first contact's probe before any; `latency_s`: what each took beside."""

    def __init__(self, probed_gb_per_s: float = 0.0) -> None:
        self._probed_gb_per_s = probed_gb_per_s
        self._nbytes = self._seconds = self._count = self._latency_s = 0.0

    def note(self, nbytes: int, busy_s: float, latency_s: float) -> None:
        """A transfer ended well: its bytes took `busy_s`, and from the last of them to its end passed `latency_s`."""
        if nbytes and busy_s > 0:
            self._nbytes, self._seconds = KEPT * self._nbytes + nbytes, KEPT * self._seconds + busy_s
            self._count, self._latency_s = KEPT * self._count + 1, KEPT * self._latency_s + latency_s

    @property
    def gb_per_s(self) -> float:
        return self._nbytes / self._seconds / 1e9 if self._seconds else self._probed_gb_per_s

    @property
    def latency_s(self) -> float:
        return self._latency_s / self._count if self._count else 0.0
