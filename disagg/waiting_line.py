"""A line of what waits: by priority, then by arrival, with every fourth place for what came first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Final, Generic, TypeVar

OLDEST_EVERY: Final = 4
"""One place of so many goes to the oldest, whatever its priority, so that a flood of more important ones delays it and
never keeps it out: behind n older ones it is served after 4 (n + 1) others at the latest."""

T = TypeVar("T", bound=Hashable)


class WaitingLine(Generic[T]):
    """A line of hashable items, each in it once. Lower priorities are served first. Pure: same calls, same order.

    `head` stays the same until it is taken, or something more important comes and it was not the oldest's turn.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[T, tuple[int, int]] = OrderedDict()
        """(priority, number) of each, in order of arrival."""
        self._order: list[tuple[int, int, T]] = []
        self._num_arrived = 0
        self._num_taken = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        """In order of priority, then of arrival."""
        return (item for _, _, item in self._order)

    def add(self, item: T, priority: int = 0) -> None:
        assert item not in self._entries
        entry = priority, self._num_arrived
        self._num_arrived += 1
        self._entries[item] = entry
        insort(self._order, (*entry, item), key=_entry_of)

    @property
    def head(self) -> T | None:
        """What `take` would give; None where nothing waits."""
        if not self._order:
            return None
        if self._num_taken % OLDEST_EVERY == OLDEST_EVERY - 1:
            return next(iter(self._entries))
        return self._order[0][2]

    def take(self) -> T:
        """Remove the head, which must be there."""
        item = self.head
        assert item is not None
        self._num_taken += 1
        self.remove(item)
        return item

    def behind_head(self, most: int) -> list[T]:
        """The next `most` after the head, in order of priority, then of arrival."""
        head = self.head
        return list(islice((item for item in self if item is not head), most))

    def first(self, most: int) -> list[T]:
        """The first `most` in order of priority, then of arrival."""
        return list(islice(self, most))

    @property
    def last(self) -> T | None:
        """The least important, of equals the newest."""
        return self._order[-1][2] if self._order else None

    def remove(self, item: T) -> None:
        """Take an item out that leaves by itself; nothing when it is not there."""
        if (entry := self._entries.pop(item, None)) is not None:
            del self._order[bisect_left(self._order, entry, key=_entry_of)]

    def check_invariants(self) -> None:
        assert [(*self._entries[item], item) for item in self] == self._order
        assert sorted(self._entries.values()) == [entry[:2] for entry in self._order]
        assert [number for _, number in self._entries.values()] == sorted(n for _, n in self._entries.values())


def _entry_of(place: tuple[int, int, object]) -> tuple[int, int]:
    return place[0], place[1]
