"""The router's choice by load, as it is: `disagg.router.placing`, asked with the simulated clock."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.router.choose import Unplaceable
from disagg.router.placing import Placing
from disagg.simulate.handoff import Ground
from disagg.simulate.records import incarnation_of, number_of, records_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.routing import Route
from disagg.simulate.worker import SimulatedWorker


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

    def count(self, request: SimulatedRequest, before: Sequence[int], after: Sequence[int]) -> None:
        """See `Routing.count`."""
        if before == after:  # as in the router, where an answer that begins changes nothing for its one worker
            return
        self._placing.count([incarnation_of(n) for n in before], [incarnation_of(n) for n in after])
