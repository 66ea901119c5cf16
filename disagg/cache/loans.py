"""Registered blocks that another worker is fetching: nothing holds them, and what needs their room takes it.

A loan only watches: when one of its slots is emptied or loses trust, the loan is broken, and its reader is told. What
the reader took from the slot before or after is judged by digests, as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

Place = tuple[int, int]
"""(pool, slot)"""


class Loans:
    """By key. Only the model thread uses it."""

    def __init__(self) -> None:
        self._places: dict[Hashable, frozenset[Place]] = {}
        self._readers: dict[Place, set[Hashable]] = {}
        self._broken: dict[Hashable, None] = {}

    def __len__(self) -> int:
        return len(self._places)

    def begin(self, key: Hashable, places: Iterable[Place]) -> None:
        """A key has one loan at a time."""
        assert key not in self._places, f"{key} has a loan already"
        self._places[key] = frozenset(places)
        for place in self._places[key]:
            self._readers.setdefault(place, set()).add(key)

    def end(self, key: Hashable) -> None:
        """Safe to repeat, and for keys without a loan."""
        self._broken.pop(key, None)
        for place in self._places.pop(key, ()):
            readers = self._readers[place]
            readers.discard(key)
            if not readers:
                del self._readers[place]

    def note_gone(self, pool: int, slots: Sequence[int]) -> None:
        """These slots hold nothing that may be reused any more."""
        if self._readers:
            for slot in slots:
                self._broken |= dict.fromkeys(self._readers.get((pool, slot), ()))

    def take_broken(self) -> tuple[Hashable, ...]:
        """Loans of which something is gone since the last call; they are over."""
        broken = tuple(self._broken)
        for key in broken:
            self.end(key)
        return broken

    def check_invariants(self) -> None:
        """Both directions say the same."""
        assert all(key in self._readers[place] for key, places in self._places.items() for place in places)
        assert all(readers and readers <= self._places.keys() for readers in self._readers.values())
        assert self._broken.keys() <= self._places.keys()
