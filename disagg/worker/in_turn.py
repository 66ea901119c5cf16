"""A part of a list that is too long to be said at once: the next part each time, so that all of it is said in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class InTurn:
    """Where in the list the next part begins; the list may change in between."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._first = 0

    def some(self, items: Sequence[T]) -> tuple[T, ...]:
        """`most` of the items at most; all of them where they are no more."""
        if len(items) <= self._most:
            return tuple(items)
        first = self._first % len(items)
        self._first = first + self._most
        return (*items[first : first + self._most], *items[: max(0, self._first - len(items))])
