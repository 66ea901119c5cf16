"""Where a request goes: the first of each role where that is the best choice there is, else what `Fleet` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final

from disagg.router.choose import Fleet, Placement, Unplaceable, link_rank
from disagg.router.load_order import LoadOrder
from disagg.router.pairing import KvFormat
from disagg.router.registry import Registry, Worker, WorkerState
from disagg.transceiver.wire.messages.router import PeerTarget

MAX_PASSED: Final = 16
"""Workers passed over (suspect, draining, full, excluded) before the whole fleet is looked at."""


class Placing:
    """The load of each worker, the router's own count, and choices by it. Pure: time is an argument of `at`."""

    def __init__(self, registry: Registry, max_queued: int) -> None:
        self.load: Counter[str] = Counter()
        """Requests placed per incarnation and not seen end."""
        self._registry, self._max_queued = registry, max_queued
        self._orders: dict[str, LoadOrder] = {}
        self._turn = 0

    def add(self, worker: Worker) -> None:
        self._orders.setdefault(worker.role, LoadOrder()).place(worker, self.load[worker.incarnation])

    def remove(self, incarnation: str) -> None:
        for order in self._orders.values():
            order.remove(incarnation)

    def count(self, before: Iterable[str], after: Iterable[str]) -> None:
        """One request moved: it was counted at the incarnations `before`, and is at those `after`."""
        self.load.subtract(before)
        self.load.update(after)
        for incarnation in {*before, *after}:
            if (worker := self._registry.get(incarnation)) is not None:
                self.add(worker)
            if not self.load[incarnation]:
                del self.load[incarnation]

    def at(self, now: float) -> PlacingAt:
        self._turn += 1
        return PlacingAt(self._orders, self._fleet(now), self.load, now, self._max_queued)

    def _fleet(self, now: float) -> Fleet:
        return Fleet(self._registry, now, self.load, self._turn, self._max_queued)

    def check_invariants(self) -> None:
        for role, order in self._orders.items():
            order.check_invariants()
            assert {worker.incarnation for worker in order} == {w.incarnation for w in self._registry if w.role == role}


class PlacingAt:
    """Answers as `Fleet` does, at one moment: a placement of the same cost."""

    def __init__(
        self, orders: Mapping[str, LoadOrder], fleet: Fleet, load: Mapping[str, int], now: float, max_queued: int
    ) -> None:
        self._orders, self._fleet, self._load, self._now, self._max_queued = orders, fleet, load, now, max_queued

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
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
        return self._fleet.unfit(kv)

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None:
        return self._fleet.prefill_for(decode, exclude)

    def _first(self, role: str, exclude: frozenset[str], *, latest_first: bool = False) -> Worker | None:
        """The least loaded worker that may be given work."""
        if (order := self._orders.get(role)) is None:
            return None
        some = islice(order.in_order(latest_first=latest_first), MAX_PASSED)
        return next((w for w in some if self._may_have_work(w) and w.incarnation not in exclude), None)

    def _may_have_work(self, worker: Worker) -> bool:
        num_waiting = self._load.get(worker.incarnation, 0) - worker.lease.num_running
        return worker.state(self._now) is WorkerState.READY and num_waiting < self._max_queued
