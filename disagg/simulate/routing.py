"""Where a request goes: the router's own placing, asked with the simulated clock, about workers that are records alone.

`disagg.router.placing` chooses, by what it counts itself and by what leases say; a worker's lease is as old here as it
would be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.router.choose import Placement, Unplaceable
from disagg.router.costs.decide import POLICIES
from disagg.router.generation import GenerationRequest
from disagg.router.placing import Placing
from disagg.router.registry import Worker
from disagg.router.workload import Share, shares_of
from disagg.simulate.handoff import Ground
from disagg.simulate.index import IndexOfBlocks
from disagg.simulate.records import number_of, records_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.worker import SimulatedWorker
from disagg.transceiver.wire.messages.values import Sampling
from disagg.transceiver.wire.timing import HEARTBEAT_S

NAMES: Final = tuple(POLICIES)
_SAMPLING: Final = Sampling(max_tokens=2)


@dataclass(frozen=True, slots=True)
class Route:
    """Numbers of workers. `server` generates the answer; without `prefill` it computes the prompt too.

    `source`: where the first `fetched` blocks of the prompt come from to the worker that computes it. `estimate_s`: of
    the time to the first token from here, 0 where none is made.
    """

    server: int
    prefill: int | None = None
    source: int | None = None
    fetched: int = 0
    estimate_s: float = 0.0


class Routing:
    """One policy of the router for one run."""

    def __init__(
        self,
        ground: Ground,
        workers: Sequence[SimulatedWorker],
        policy: str,
        *,
        max_queued: int = 1024,
        max_local_prefill: int = 0,
    ) -> None:
        """`policy`: one of `NAMES`."""
        self._ground, self._workers = ground, workers
        registry = records_of(workers, ground)
        self._records: list[Worker] = list(registry)
        self._placing = Placing(registry, max_queued, POLICIES[policy], max_local_prefill)
        for worker in registry:
            self._placing.add(worker)
        self._shares: dict[SimulatedRequest, tuple[Placement, tuple[Share, ...]]] = {}
        self._is_due = [False] * len(workers)
        self._index = IndexOfBlocks(ground, workers) if POLICIES[policy].weighs_all else None

    def place(self, request: SimulatedRequest) -> Route | str:
        """Where it goes, which counts from here on; or why there is no place for it."""
        placed = self._choose(request)
        if isinstance(placed, Unplaceable):
            return placed.reason
        self._count(request, placed, shares_of(placed, request.traced.prompt_len, 1, has_begun=False))
        return self._route(placed)

    def note_first(self, request: SimulatedRequest) -> None:
        """The client has its first token."""
        placed, _ = self._shares[request]
        self._count(request, placed, shares_of(placed, request.traced.prompt_len, 1, has_begun=True))

    def note_end(self, request: SimulatedRequest) -> None:
        """The client has its last token."""
        placed, _ = self._shares[request]
        self._count(request, placed, ())
        del self._shares[request]
        self._placing.work.note_answer(request.traced.answer_len)

    def _choose(self, request: SimulatedRequest) -> Placement | Unplaceable:
        traced = request.traced
        asked = GenerationRequest(str(request.number), range(traced.prompt_len), _SAMPLING)
        held = self._index.who_holds(traced.hashes, traced.prompt_len) if self._index is not None else {}
        return self._placing.at(self._ground.agenda.now, asked, held).place(traced.answer_len)

    def _route(self, placed: Placement) -> Route:
        way = placed.way
        prefill = None if placed.prefill is None else number_of(placed.prefill.incarnation)
        route = Route(number_of(placed.server.incarnation), prefill, estimate_s=way.ttft_s if way is not None else 0.0)
        if way is None or way.start.source is None:
            return route
        return replace(
            route, source=number_of(way.start.source), fetched=way.start.boundary // self._ground.geometry.unit
        )

    def _count(self, request: SimulatedRequest, placed: Placement, after: tuple[Share, ...]) -> None:
        _, before = self._shares.get(request, (placed, ()))
        if before == after:
            return
        self._placing.count(before, after)
        self._shares[request] = placed, after
        for share in {*before, *after}:
            self._renew_later(number_of(share.incarnation))

    def _renew_later(self, number: int) -> None:
        """Let the worker's next lease tell of what changed."""
        if self._is_due[number]:
            return
        self._is_due[number] = True

        def renew() -> None:
            self._is_due[number] = False
            worker, record = self._workers[number], self._records[number]
            record.lease = replace(record.lease, num_running=worker.num_running, num_queued=worker.num_waiting)

        self._ground.agenda.after(HEARTBEAT_S, renew)
