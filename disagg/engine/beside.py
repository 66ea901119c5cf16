"""What may start beside a sequence that waits for room, without making it wait longer. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from disagg.cache.admission import Peaks, Promises

LOOK_BEHIND: Final = 16
"""How many behind a head that waits for room are tried instead of it: some 30 microseconds of each step that finds no
room, and more than a step begins."""


class RoomBeside:
    """What the head of the line leaves of empty pools: the sequences that start before the head must all fit into it.

    So the head has room once the sequences that ran when it got there have ended, and waits for those alone, as in a
    line that nothing passes. A sequence that started here and grows beyond its promise lets nothing more start until it
    has ended.
    """

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._head: Hashable = None
        self._started: set[Hashable] = set()

    def fits(self, head: Hashable, need: Peaks, peaks: Peaks) -> bool:
        """Whether a sequence of these `peaks` may start before `head`, which needs `need`."""
        if head != self._head:
            self._head, self._started = head, set()
        beside = [held for key in self._started if (held := self._promises.of(key)) is not None]
        together = tuple(map(sum, zip(need, peaks, *beside, strict=True)))
        return self._promises.fits_empty(together)

    def note(self, key: Hashable) -> None:
        """Count a sequence that starts before the head that `fits` was asked about last."""
        self._started.add(key)

    def forget(self, key: Hashable) -> None:
        """Count a sequence no more: it gave its promise back."""
        self._started.discard(key)

    def check_invariants(self) -> None:
        assert all(self._promises.of(key) is not None for key in self._started), "what passed the head holds nothing"
