"""Where a request goes: the router's own placing, asked with the simulated clock, about workers that are records alone.

`disagg.router.placing` chooses, by what it counts itself and by what leases say; a worker's lease is as old here as it
would be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.router.choose import Placement, Unplaceable
from disagg.router.costs.decide import POLICIES, decide
from disagg.router.costs.rates import LinkRate
from disagg.router.costs.ways import Ask
from disagg.router.generation import GenerationRequest
from disagg.router.placing import MAX_CANDIDATES, Placing
from disagg.router.registry import Worker
from disagg.router.workload import Share, shares_of
from disagg.simulate.handoff import Ground
from disagg.simulate.holders import Holders
from disagg.simulate.records import incarnation_of, number_of, records_of
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
        asked = GenerationRequest(str(request.number), range(request.traced.prompt_len), _SAMPLING)
        return self._placing.at(self._ground.agenda.now, asked).place(request.traced.answer_len)

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


class PrefixRouting(Routing):
    """Weighs own and fetched prefixes too: candidates are also the workers that hold most of a prompt."""

    def __init__(
        self,
        ground: Ground,
        workers: Sequence[SimulatedWorker],
        policy: str,
        *,
        max_queued: int = 1024,
        max_local_prefill: int = 0,
    ) -> None:
        super().__init__(ground, workers, policy, max_queued=max_queued, max_local_prefill=max_local_prefill)
        self._holders = Holders(workers)
        self._link = LinkRate(ground.rates.link_bytes_per_s / 1e9, ground.rates.link_latency_s)
        self._turn = 0

    def _choose(self, request: SimulatedRequest) -> Placement | Unplaceable:
        placing, traced = self._placing, request.traced
        numbers = self._candidates(request)
        named = ((incarnation_of(n), self._tokens_held(n, request)) for n in numbers)
        expected = min(traced.answer_len, placing.work.mean_answer)
        held = {name: tokens for name, tokens in named if tokens}
        ask = Ask(traced.prompt_len, traced.answer_len, expected, held, placing.max_local_prefill)
        records = [self._records[number] for number in numbers]
        candidates = [placing.rates.candidate(one, placing.work, placing.load[one.incarnation]) for one in records]
        self._turn += 1
        way = decide(ask, candidates, self._link_between, placing.policy, self._turn)
        if way is None:
            return super()._choose(request)
        server = placing.target(way.landing.worker.name)
        return Placement(server, None if way.is_local else placing.target(way.start.worker.name), way)

    def _candidates(self, request: SimulatedRequest) -> list[int]:
        least = self._placing.least_loaded(MAX_CANDIDATES)
        holders = self._holders.of(request.traced.hashes, MAX_CANDIDATES)
        return list(dict.fromkeys((*(number_of(worker.incarnation) for worker in least), *holders)))

    def _tokens_held(self, number: int, request: SimulatedRequest) -> int:
        store, traced = self._workers[number].store, request.traced
        return store.usable(traced.hashes, traced.prompt_len) * store.unit

    def _link_between(self, source: str, sink: str) -> LinkRate:
        return self._link


def routing_of(
    ground: Ground,
    workers: Sequence[SimulatedWorker],
    policy: str,
    *,
    max_queued: int = 1024,
    max_local_prefill: int = 0,
) -> Routing:
    """The routing of a policy by its name."""
    kind = PrefixRouting if POLICIES[policy].weighs_all else Routing
    return kind(ground, workers, policy, max_queued=max_queued, max_local_prefill=max_local_prefill)
