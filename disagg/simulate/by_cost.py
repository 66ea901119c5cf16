"""The router's choice by cost: `disagg.router.costs` decides, from what a router would know.

A router knows what it has placed and not seen begin, what answers where, and which worker holds which blocks. A large
fleet's workers are not all weighed: of each role the least loaded few, and those that hold most of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from disagg.cache.layout import CacheLayout
from disagg.router.costs.decide import Policy, decide
from disagg.router.costs.kv_shape import GroupShape, KvShape
from disagg.router.costs.rates import LinkRate, Rates
from disagg.router.costs.ways import Ask, Candidate, Way
from disagg.router.load_order import LoadOrder
from disagg.router.registry import Worker
from disagg.router.tenants import FIRST_GUESS_TOKENS, WEIGHT_OF_ONE
from disagg.simulate.handoff import Ground
from disagg.simulate.holders import Holders
from disagg.simulate.rates import ClusterRates
from disagg.simulate.records import incarnation_of, number_of, records_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.routing import Route
from disagg.simulate.worker import SimulatedWorker

WEIGHED: Final = 3
"""Workers of a role that are weighed by their load, and holders of a prefix: with more of them a choice takes longer
than the rest of a request, and seldom ends otherwise."""


class LowestCost:
    """Weighs ways by one policy of the router's."""

    def __init__(
        self, ground: Ground, workers: Sequence[SimulatedWorker], policy: Policy, *, max_local_prefill: int = 0
    ) -> None:
        self._workers, self._policy, self._max_local_prefill = workers, policy, max_local_prefill
        self._kv = shape_of(ground.geometry.layout)
        self._rates = worker_rates(ground.rates)
        self._link = LinkRate(ground.rates.link_bytes_per_s / 1e9, ground.rates.link_latency_s)
        self._unit = ground.geometry.unit
        self._load = [0] * len(workers)
        self._prompt_tokens = [0] * len(workers)
        """Placed where they are computed, and no token seen of their answer."""
        self._answers = [0] * len(workers)
        self._expected: float = FIRST_GUESS_TOKENS
        self._holders = Holders(workers)
        self._turn = 0
        self._records: dict[int, Worker] = {}
        self._orders: dict[str, LoadOrder] = {}
        for record in records_of(workers, ground.geometry.layout):
            self._records[number_of(record.incarnation)] = record
            self._orders.setdefault(record.role, LoadOrder()).place(record, 0)

    def choose(self, request: SimulatedRequest, now: float) -> Route | str:
        """See `Routing.choose`."""
        traced = request.traced
        holders = self._holders.of(traced.hashes, WEIGHED) if self._policy.weighs_all else ()
        numbers = dict.fromkeys((*self._least_loaded(), *holders))
        held = {incarnation_of(n): self._tokens_held(n, request) for n in numbers} if holders else {}
        ask = Ask(
            traced.prompt_len,
            traced.answer_len,
            expected_tokens=min(traced.answer_len, max(1.0, self._expected)),
            held={name: tokens for name, tokens in held.items() if tokens},
            max_local_prefill=self._max_local_prefill,
        )
        way = decide(ask, [self._candidate(n) for n in numbers], self._links, self._policy, self._turn)
        self._turn += 1
        return "no worker may take it" if way is None else self._route(way)

    def count(self, request: SimulatedRequest, before: Sequence[int], after: Sequence[int]) -> None:
        """See `Routing.count`."""
        traced, server = request.traced, request.server
        assert server is not None
        computing = server if request.prefill is None else request.prefill
        if not before:
            self._prompt_tokens[computing] += traced.prompt_len - request.num_expected_cached
        elif request.first_at is not None and request.ended_at is None:
            self._prompt_tokens[computing] -= traced.prompt_len - request.num_expected_cached
            self._answers[server] += 1
        elif request.ended_at is not None:
            self._answers[server] -= 1
            self._expected += (traced.answer_len - self._expected) * WEIGHT_OF_ONE
        for number in {*before, *after}:
            self._load[number] += (number in after) - (number in before)
            self._orders[self._workers[number].role].place(self._records[number], self._load[number])

    def _least_loaded(self) -> Iterator[int]:
        for order in self._orders.values():
            yield from (number_of(worker.incarnation) for worker in islice(order, WEIGHED))

    def _tokens_held(self, number: int, request: SimulatedRequest) -> int:
        traced = request.traced
        return self._workers[number].store.usable(traced.hashes, traced.prompt_len) * self._unit

    def _candidate(self, number: int) -> Candidate:
        return Candidate(
            incarnation_of(number),
            self._workers[number].role,
            self._kv,
            self._rates,
            queue_s=self._prompt_tokens[number] / self._rates.prefill_tokens_per_s,
            num_answers=self._answers[number],
            num_requests=self._load[number],
        )

    def _links(self, source: str, sink: str) -> LinkRate:
        return self._link

    def _route(self, way: Way) -> Route:
        start, server = way.start, number_of(way.landing.worker.name)
        prefill = None if way.is_local else number_of(start.worker.name)
        cached = start.boundary
        if start.source is None:
            return Route(server, prefill, num_expected_cached=cached, estimate_s=way.ttft_s)
        source, fetched = number_of(start.source), cached // self._unit
        return Route(server, prefill, source, fetched, num_expected_cached=cached, estimate_s=way.ttft_s)


def shape_of(layout: CacheLayout) -> KvShape:
    groups = zip(layout.groups, layout.pool_of_group, strict=True)
    shapes = (GroupShape(group.window, group.num_sink_tokens, layout.slot_nbytes[pool]) for group, pool in groups)
    return KvShape(layout.block_size, tuple(shapes))


def worker_rates(rates: ClusterRates) -> Rates:
    """What a lease would say."""
    return Rates(rates.prefill_tokens_per_s, rates.decode_step_s.points)
