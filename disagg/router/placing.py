"""Where a request goes: under `prefix-aware` the cheapest way among a few candidates, else the first of each role where
that is the best choice there is; what `Fleet` says where neither finds a place among healthy workers.

Whatever the number of workers, a choice looks at few: the first of each role in the order of their load.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Final

from disagg.router.choose import Fleet, Placement, Unplaceable, link_rank
from disagg.router.costs.decide import POLICIES, Policy, decide
from disagg.router.costs.ways import Ask
from disagg.router.generation import GenerationRequest
from disagg.router.known_rates import KnownLinks, KnownRates
from disagg.router.load_order import LoadOrder
from disagg.router.pairing import KvFormat
from disagg.router.registry import Registry, Worker, WorkerState
from disagg.router.workload import Share, Workload
from disagg.transceiver.wire.messages.router import PeerTarget

MAX_PASSED: Final = 16
"""Workers passed over (suspect, draining, full, excluded) before the whole fleet is looked at."""

MAX_CANDIDATES: Final = 3
"""Of each role, the least loaded: nine pairs and three workers alone are weighed in 0.1 ms, and the fourth in the order
of load would rarely have been cheaper."""

log = logging.getLogger(__name__)


class Placing:
    """The load of each worker, the router's own count, and choices by it. Pure: time is an argument of `at`."""

    def __init__(
        self,
        registry: Registry,
        max_queued: int,
        policy: Policy = POLICIES["least-loaded"],
        max_local_prefill: int = 0,
    ) -> None:
        self.load: Counter[str] = Counter()
        """Requests placed per incarnation and not seen end."""
        self.work = Workload()
        self.policy, self.max_local_prefill = policy, max_local_prefill
        self.rates, self.links = KnownRates(), KnownLinks(registry)
        self._registry, self._max_queued = registry, max_queued
        self._orders: dict[str, LoadOrder] = {}
        self._unfit: dict[KvFormat | None, frozenset[str]] = {}
        """As long as no worker comes or goes: the answers of one that died ask all at once."""
        self._turn = 0

    def add(self, worker: Worker) -> None:
        self._unfit.clear()
        self._put_in_order(worker)

    def _put_in_order(self, worker: Worker) -> None:
        load = 0 if self.policy.name == "round-robin" else self.load[worker.incarnation]  # each time to the end of it
        self._orders.setdefault(worker.role, LoadOrder()).place(worker, load)

    def remove(self, incarnation: str) -> None:
        self._unfit.clear()
        self.rates.forget(incarnation)
        for order in self._orders.values():
            order.remove(incarnation)

    def count(self, before: Iterable[Share], after: Iterable[Share]) -> None:
        """One request went on: it had the shares `before`, and has those `after`."""
        self.work.move(before, after)
        were, are = [share.incarnation for share in before], [share.incarnation for share in after]
        self.load.subtract(were)
        self.load.update(are)
        for incarnation in {*were, *are}:
            if (worker := self._registry.get(incarnation)) is not None:
                self._put_in_order(worker)
            if not self.load[incarnation]:
                del self.load[incarnation]

    def at(
        self, now: float, request: GenerationRequest | None = None, held: Mapping[str, int] | None = None
    ) -> PlacingAt:
        """Choices at this moment; estimated ones for `request`, if the policy estimates.

        `held`: by incarnation, from how many of its tokens a worker could go on; few workers.
        """
        self._turn += 1
        weighs = request is not None and self.policy.weighs_all
        estimates = Estimates(self, request, held or {}, self._turn) if request is not None and weighs else None
        fleet = self._fleet(now)
        return PlacingAt(self._orders, fleet, self.load, now, self._max_queued, self._unfit, estimates)

    def knows(self, incarnation: str) -> bool:
        return self._registry.get(incarnation) is not None

    def holders(self, held: Iterable[str]) -> list[Worker]:
        return [worker for incarnation in held if (worker := self._registry.get(incarnation)) is not None]

    def target(self, incarnation: str) -> PeerTarget:
        worker = self._registry.get(incarnation)
        assert worker is not None
        return worker.target

    def _fleet(self, now: float) -> Fleet:
        load = {} if self.policy.name == "round-robin" else self.load
        return Fleet(self._registry, now, load, self._turn, self._max_queued)

    def check_invariants(self) -> None:
        for role, order in self._orders.items():
            order.check_invariants()
            assert {worker.incarnation for worker in order} == {w.incarnation for w in self._registry if w.role == role}


class Estimates:
    """The cost function asked about one request."""

    def __init__(self, placing: Placing, request: GenerationRequest, held: Mapping[str, int], turn: int) -> None:
        self._placing, self._request, self._turn = placing, request, turn
        self.held = {incarnation: count for incarnation, count in held.items() if placing.knows(incarnation)}

    def place(self, workers: Iterable[Worker], max_tokens: int) -> Placement | None:
        placing = self._placing
        candidates = [placing.rates.candidate(w, placing.work, placing.load[w.incarnation]) for w in workers]
        way = decide(self._ask(max_tokens), candidates, placing.links, placing.policy, self._turn)
        if way is None:
            return None
        log.debug("request %s: %s of %d candidates", self._request.request_id, way, len(candidates))
        server = placing.target(way.landing.worker.name)
        return Placement(server, None if way.is_local else placing.target(way.start.worker.name), way)

    def holders(self) -> list[Worker]:
        """The workers that hold something of the prompt."""
        return self._placing.holders(self.held)

    def _ask(self, max_tokens: int) -> Ask:
        request, placing = self._request, self._placing
        num_emitted = request.sampling.max_tokens - max_tokens  # an answer that goes on has fewer left
        expected = min(max_tokens, placing.work.mean_answer) * request.sampling.num_choices
        return Ask(len(request.prompt) + num_emitted, max_tokens, expected, self.held, placing.max_local_prefill)


class PlacingAt:
    """Answers as `Fleet` does, at one moment: a placement of the same cost, or of the least estimated one."""

    def __init__(
        self,
        orders: Mapping[str, LoadOrder],
        fleet: Fleet,
        load: Mapping[str, int],
        now: float,
        max_queued: int,
        unfit: dict[KvFormat | None, frozenset[str]],
        estimates: Estimates | None = None,
    ) -> None:
        self._orders, self._fleet, self._load, self._now, self._max_queued = orders, fleet, load, now, max_queued
        self._unfit, self._estimates = unfit, estimates

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
        if self._estimates is not None:
            orders = self._orders.values()
            few = [worker for order in orders for worker in islice(self._able(order, exclude), MAX_CANDIDATES)]
            few += [w for w in self._estimates.holders() if w not in few and self._may_be_given_work(w, exclude)]
            if (placed := self._estimates.place(few, max_tokens)) is not None:
                return placed
        if max_tokens > 1:
            # Each prefill worker meets every decode worker before the next: else two orders of equal loads go in step.
            stays = self._fleet.turn % max(1, len(self._orders.get("decode", ()))) > 0
            prefill, decode = self._first("prefill", exclude, latest_first=stays), self._first("decode", exclude)
            if prefill and decode and link_rank(prefill, decode) == 0:
                return Placement(decode.target, prefill.target)
        return self._fleet.place(max_tokens, exclude)

    def alone(self, exclude: frozenset[str]) -> Placement | Unplaceable:
        return self._fleet.alone(exclude)

    def unfit(self, kv: KvFormat | None) -> frozenset[str]:
        if (found := self._unfit.get(kv)) is None:
            found = self._unfit[kv] = self._fleet.unfit(kv)
        return found

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None:
        return self._fleet.prefill_for(decode, exclude)

    def _first(self, role: str, exclude: frozenset[str], *, latest_first: bool = False) -> Worker | None:
        """The least loaded worker that may be given work."""
        if (order := self._orders.get(role)) is None:
            return None
        return next(self._able(order, exclude, latest_first=latest_first), None)

    def _able(self, order: LoadOrder, exclude: frozenset[str], *, latest_first: bool = False) -> Iterator[Worker]:
        some = islice(order.in_order(latest_first=latest_first), MAX_PASSED)
        return (w for w in some if self._may_be_given_work(w, exclude))

    def _may_be_given_work(self, worker: Worker, exclude: frozenset[str]) -> bool:
        return worker.incarnation not in exclude and self._may_have_work(worker)

    def _may_have_work(self, worker: Worker) -> bool:
        num_waiting = self._load.get(worker.incarnation, 0) - worker.lease.num_running
        return worker.state(self._now) is WorkerState.READY and num_waiting < self._max_queued
