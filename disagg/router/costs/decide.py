"""Which of the legal ways a request takes: the cheapest, ties in turn. Policies are presets of what counts as cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.router.costs.rates import Links
from disagg.router.costs.ways import Ask, Candidate, Way, legal_ways

TIE: Final = 1.05
"""Two ways that compute and move the same are equally good within 5 %: rates are measured, and differ by as much from
one second to the next. Without it an idle fleet of equal workers would always use the same one."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`weigh`: of two ways the one with less is better. `weighs_all`: all legal ways are weighed; else those alone
    that need no estimate, which are pairs of a prefill and a decode worker, or `both` workers where there is no pair.
    """

    name: str
    weigh: Callable[[Way], float]
    weighs_all: bool = False


POLICIES: Final[Mapping[str, Policy]] = {
    policy.name: policy
    for policy in (
        Policy("round-robin", lambda way: 0.0),
        Policy("least-loaded", lambda way: float(way.num_requests)),
        Policy("prefix-aware", lambda way: way.cost_s, weighs_all=True),
    )
}


def decide(ask: Ask, candidates: Sequence[Candidate], links: Links, policy: Policy, turn: int = 0) -> Way | None:
    """The way that `policy` takes; None where no way is legal. `turn`, one higher per choice, breaks ties.

    Where every way is over the bound on computing beside answers, `both` workers take the request all the same.
    """
    ways = _considered(legal_ways(ask, candidates, links), policy)
    if not ways:
        both = [worker for worker in candidates if worker.role == "both"]
        ways = _considered(legal_ways(replace(ask, max_local_prefill=ask.num_tokens), both, links), policy)
    return cheapest(ways, policy, turn) if ways else None


def cheapest(ways: Sequence[Way], policy: Policy, turn: int = 0) -> Way:
    """Of at least one way."""
    costs = [policy.weigh(way) for way in ways]
    least = min(costs)
    best = ways[costs.index(least)]
    if policy.weighs_all:
        near = [way for way, cost in zip(ways, costs, strict=True) if cost <= least * TIE]
        equal = [way for way in near if _is_alike(way, best)]
    else:
        equal = [way for way, cost in zip(ways, costs, strict=True) if cost == least]
    return equal[turn % len(equal)]


def _considered(ways: Iterable[Way], policy: Policy) -> list[Way]:
    if policy.weighs_all:
        return list(ways)
    own = [way for way in ways if way.start.source is None]
    pairs = [way for way in own if (way.start.worker.role, way.landing.worker.role) == ("prefill", "decode")]
    return pairs or [way for way in own if way.is_local and way.start.worker.role != "decode"]


def _is_alike(way: Way, best: Way) -> bool:
    """Computes and moves as much, in the same manner: what differs is measured speed, or the length of queues."""
    return (
        way.is_local is best.is_local
        and way.start.num_computed == best.start.num_computed
        and way.start.fetched_nbytes == best.start.fetched_nbytes
        and way.landing.nbytes == best.landing.nbytes
    )
