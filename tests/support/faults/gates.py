"""Gates in a worker under test: events of its engine and jobs of its landing thread stop there until told to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from support.event_loop import PATIENCE_S

from disagg.transceiver.memory.regions import LandingJob, PoolRegion


class EventGate:
    """Holds some events of an engine on their way to the worker; the others overtake them."""

    def __init__(self) -> None:
        self.put: Callable[[Sequence[Any]], None]
        self._hold: Callable[[Any], bool] | None = None
        self._held: list[Any] = []

    def hold(self, which: Callable[[Any], bool]) -> None:
        self._hold = which

    def take(self, events: Sequence[Any]) -> None:
        for event in events:
            if self._hold is not None and self._hold(event):
                self._held.append(event)
            else:
                self.put([event])

    def open(self) -> None:
        held, self._held, self._hold = self._held, [], None
        self.put(held)

    def is_holding(self, kind: type) -> bool:
        return any(isinstance(event, kind) for event in self._held)


class LandingGate:
    """The hook between a landing job's copy and its hash: stops the thread there, flips a byte there."""

    def __init__(self) -> None:
        self._may_go = threading.Event()
        self._may_go.set()
        self.flip_at: Callable[[LandingJob, Sequence[PoolRegion]], tuple[int, int, int]] | None = None
        """-> (pool, slot, byte) to flip in the next job that passes."""
        self.on_job: Callable[[LandingJob], None] | None = None
        self.num_inside = 0
        self.num_landed = 0
        self.num_flipped = 0

    def __call__(self, job: LandingJob, pools: Sequence[PoolRegion]) -> None:
        if self.on_job is not None:
            self.on_job(job)
        self.num_inside += 1
        assert self._may_go.wait(PATIENCE_S)
        self.num_inside -= 1
        if self.flip_at is not None:
            pool, slot, byte = self.flip_at(job, pools)
            pools[pool].slots[slot, byte] ^= 1
            self.flip_at = None
            self.num_flipped += 1
        self.num_landed += 1

    def shut(self) -> None:
        self._may_go.clear()

    def open(self) -> None:
        self._may_go.set()
