"""Where a request goes: the product's own choice, made for workers that exist as records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from disagg.router.choose import Unplaceable
from disagg.router.placing import Placing
from disagg.simulate.handoff import Ground
from disagg.simulate.records import incarnation_of, number_of, records_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.worker import SimulatedWorker


@dataclass(frozen=True, slots=True)
class Route:
    """Numbers of workers. `server` generates the answer; without `prefill` it computes the prompt too.

    `source`: where the first `fetched` blocks of the prompt come from to the worker that computes it.
    """

    server: int
    prefill: int | None = None
    source: int | None = None
    fetched: int = 0


class Routing(Protocol):
    """Chooses for one request at a time, and is told what became of it."""

    def choose(self, request: SimulatedRequest, now: float) -> Route | str:
        """A route, or why there is none."""

    def count(self, before: Sequence[int], after: Sequence[int]) -> None:
        """A request was at the workers `before` and is at those `after`."""


class LeastLoaded:
    """The placing of the router as it is: the least loaded pair, in turn where loads are equal."""

    def __init__(self, ground: Ground, workers: Sequence[SimulatedWorker], *, max_queued: int = 1024) -> None:
        registry = records_of(workers, ground.geometry.layout)
        self._placing = Placing(registry, max_queued)
        for worker in registry:
            self._placing.add(worker)

    def choose(self, request: SimulatedRequest, now: float) -> Route | str:
        """See `Routing.choose`."""
        placed = self._placing.at(now).place(request.traced.answer_len)
        if isinstance(placed, Unplaceable):
            return placed.reason
        prefill = None if placed.prefill is None else number_of(placed.prefill.incarnation)
        return Route(number_of(placed.server.incarnation), prefill)

    def count(self, before: Sequence[int], after: Sequence[int]) -> None:
        """See `Routing.count`."""
        self._placing.count([incarnation_of(n) for n in before], [incarnation_of(n) for n in after])
