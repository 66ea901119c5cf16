"""Slices that were not asked for: how long they are kept, and which epochs' are dropped as they come."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

KEEP_S: Final = 10.0
"""A slice's announcement and its bytes leave together; one that is not asked for as long as a lease lasts belongs to no
live transfer and is dropped, so that it cannot stand in the way of others."""

MAX_ENDED: Final = 1024
"""Ended epochs to remember: far more than can have slices under way."""

Name = TypeVar("Name", bound=Hashable)


class EndedEpochs(Generic[Name]):
    """Names of epochs whose slices will not be landed; of too many the oldest is forgotten."""

    def __init__(self) -> None:
        self._names: dict[Name, None] = {}

    def add(self, name: Name) -> None:
        self._names[name] = None
        if len(self._names) > MAX_ENDED:
            del self._names[next(iter(self._names))]

    def __contains__(self, name: Name) -> bool:
        return name in self._names
