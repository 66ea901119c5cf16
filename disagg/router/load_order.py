"""Workers of one role by their load, kept in order as requests come and go, so that a choice looks at one or two.

A worker whose load changes goes to the end of those with its new load: among equals the one that waited longest is
next. What a worker's state forbids is decided by the caller, at the moment of the choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from disagg.router.registry import Worker


class LoadOrder:
    """Each change costs O(log of the different loads), whatever the number of workers."""

    def __init__(self) -> None:
        self._by_load: dict[int, dict[str, Worker]] = {}
        self._loads: list[int] = []
        """A heap of the keys of `_by_load`."""
        self._load_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._load_of)

    def place(self, worker: Worker, load: int) -> None:
        """Add a worker, or note its new load."""
        self.remove(worker.incarnation)
        if load not in self._by_load:
            self._by_load[load] = {}
            heapq.heappush(self._loads, load)
        self._by_load[load][worker.incarnation] = worker
        self._load_of[worker.incarnation] = load

    def remove(self, incarnation: str) -> None:
        """Forget a worker; one that is not there is no error."""
        load = self._load_of.pop(incarnation, None)
        if load is not None:
            del self._by_load[load][incarnation]
            while self._loads and not self._by_load[self._loads[0]]:
                del self._by_load[heapq.heappop(self._loads)]

    def __iter__(self) -> Iterator[Worker]:
        return self.in_order()

    def in_order(self, *, latest_first: bool = False) -> Iterator[Worker]:
        """The least loaded first, of these the one that waited longest or least. Nothing may change meanwhile."""
        if self._loads:
            least = self._by_load[self._loads[0]].values()
            yield from reversed(least) if latest_first else least
        for load in sorted(self._by_load)[1:]:
            yield from self._by_load[load].values()

    def check_invariants(self) -> None:
        assert sorted(self._loads) == sorted(self._by_load)
        assert {name: load for load, some in self._by_load.items() for name in some} == self._load_of
        assert not self._loads or self._by_load[self._loads[0]]
