"""Sources of prefixes that failed lately are asked again later. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FAILURES: Final = 2
"""In a row: one may be chance, such as blocks that were evicted a moment ago."""

FIRST_S: Final = 1.0
MAX_S: Final = 60.0
"""Doubling from a second, in which a busy source has caught up, to a minute, in which one that never works is asked as
seldom as it costs nothing."""


@dataclass(slots=True)
class _Source:
    num_failures: int = 0
    pause_s: float = FIRST_S
    until: float = 0.0


class BackOff:
    """By incarnation."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def may_ask(self, source: str, now: float) -> bool:
        known = self._sources.get(source)
        return known is None or now >= known.until

    def failed(self, source: str, now: float) -> None:
        known = self._sources.setdefault(source, _Source())
        known.num_failures += 1
        if known.num_failures >= FAILURES:
            known.until = now + known.pause_s
            known.pause_s = min(2 * known.pause_s, MAX_S)

    def succeeded(self, source: str) -> None:
        self._sources.pop(source, None)

    def forget(self, source: str) -> None:
        """It is registered no more."""
        self._sources.pop(source, None)
