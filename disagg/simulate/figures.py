"""What one run came to: times, rates, hits, bytes and use of workers, as numbers for a table, JSON and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.simulation import Outcome

PARTS: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a client calls good: seconds to the first token, and from token to token in the mean of its answer."""

    ttft_s: float = 2.0
    itl_s: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("itl_s", self.itl_s)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value}, expected seconds above 0")


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, tokens, bytes; parts of 1. Percentiles by their number: p50, p90, p99; `{}` where nothing was answered.

    `ttft_s` from arrival to the first token; `itl_s` between two tokens, over all of them; `e2e_s` to the last.
    `hit_rate`: prompt tokens that were not computed where their prompt was. `good`: requests within the objectives,
    of all that arrived; `goodput`: such requests per second. `busy`: by role, seconds of steps over those of the run.
    `batch`: answers in a step of those that have any. `estimate_error`: of the router's own estimates of the time to
    the first token after placing, in the median over those that it made; None where it made none.
    """

    policy: str
    fleet: str
    num_requests: int
    num_refused: int
    span_s: float
    ttft_s: dict[str, float]
    itl_s: dict[str, float]
    e2e_s: dict[str, float]
    tokens_per_s: float
    requests_per_s: float
    good: float
    goodput: float
    hit_rate: float
    num_fetched_tokens: int
    num_computed_tokens: int
    handoff_nbytes: dict[str, int]
    prefix_nbytes: dict[str, int]
    busy: dict[str, float]
    batch: float
    num_evicted: int
    num_dropped: int
    num_events: int
    estimate_error: float | None

    @property
    def moved_nbytes(self) -> int:
        return sum(self.handoff_nbytes.values()) + sum(self.prefix_nbytes.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def figures(outcome: Outcome, objectives: Objectives) -> Figures:
    """Of one run that has ended."""
    answered = [r for r in outcome.requests if r.ended_at is not None]
    span_s = outcome.ended_at - outcome.requests[0].traced.arrival_s or 1.0
    good = sum(is_good(request, objectives) for request in answered)
    tokens, prompt_tokens = (
        sum(count) for count in ((r.traced.answer_len for r in answered), (r.traced.prompt_len for r in answered))
    )
    names = [group.name for group in outcome.setting.kind.layout.groups]
    return Figures(
        policy=outcome.setting.policy,
        fleet=str(outcome.setting.fleet),
        num_requests=len(outcome.requests),
        num_refused=len(outcome.requests) - len(answered),
        span_s=span_s,
        ttft_s=percentiles([ttft_of(request) for request in answered]),
        itl_s=weighted_percentiles(outcome.gaps),
        e2e_s=percentiles([_seconds(r.ended_at) - r.traced.arrival_s for r in answered]),
        tokens_per_s=tokens / span_s,
        requests_per_s=len(answered) / span_s,
        good=good / len(outcome.requests),
        goodput=good / span_s,
        hit_rate=sum(r.num_cached for r in answered) / prompt_tokens if prompt_tokens else 0.0,
        num_fetched_tokens=sum(r.num_fetched for r in answered),
        num_computed_tokens=sum(worker.num_computed for worker in outcome.workers),
        handoff_nbytes=_sums(names, (r.handoff_nbytes for r in answered)),
        prefix_nbytes=_sums(names, (r.prefix_nbytes for r in answered)),
        busy=_busy(outcome, span_s),
        batch=_batch(outcome),
        num_evicted=sum(worker.store.num_evicted for worker in outcome.workers),
        num_dropped=sum(request.num_drops for request in outcome.requests),
        num_events=outcome.num_events,
        estimate_error=_estimate_error(answered),
    )


def ttft_of(request: SimulatedRequest) -> float:
    """Seconds from arrival to the first token."""
    return _seconds(request.first_at) - request.traced.arrival_s


def is_good(request: SimulatedRequest, objectives: Objectives) -> bool:
    if ttft_of(request) > objectives.ttft_s:
        return False
    more = request.traced.answer_len - 1
    return not more or (_seconds(request.ended_at) - _seconds(request.first_at)) / more <= objectives.itl_s


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest value that so many percent do not exceed."""
    return weighted_percentiles([(value, 1) for value in values])


def weighted_percentiles(values: Sequence[tuple[float, int]]) -> dict[str, float]:
    """As `percentiles`, each value as often as it says."""
    if not values:
        return {}
    ordered = np.array(sorted(values))
    sums = np.cumsum(ordered[:, 1])
    places = [min(int(np.searchsorted(sums, part / 100 * sums[-1])), len(ordered) - 1) for part in PARTS]
    return {f"p{part}": float(ordered[place, 0]) for part, place in zip(PARTS, places, strict=True)}


def _seconds(moment: float | None) -> float:
    assert moment is not None
    return moment


def _sums(names: Sequence[str], nbytes: Iterable[Sequence[int]]) -> dict[str, int]:
    sums = dict.fromkeys(names, 0)
    for some in nbytes:
        for name, count in zip(names, some, strict=False):
            sums[name] += count
    return sums


def _busy(outcome: Outcome, span_s: float) -> dict[str, float]:
    """By role, and of the front end where it shares the cores."""
    found = {}
    for role in dict.fromkeys(worker.role for worker in outcome.workers):
        workers = [worker for worker in outcome.workers if worker.role == role]
        found[role] = sum(worker.busy_s for worker in workers) / len(workers) / span_s
    if outcome.setting.num_cores:
        found["front end"] = outcome.front_busy_s / span_s
    return found


def _batch(outcome: Outcome) -> float:
    steps = sum(worker.num_answer_steps for worker in outcome.workers)
    return sum(worker.num_answer_tokens for worker in outcome.workers) / steps if steps else 0.0


def _estimate_error(answered: Sequence[SimulatedRequest]) -> float | None:
    """How far estimates were off in the median, of what came true."""
    errors = []
    for request in answered:
        if request.estimate_s:
            true_s = _seconds(request.first_at) - _seconds(request.placed_at)
            errors.append(abs(request.estimate_s - true_s) / true_s if true_s else 0.0)
    return percentiles(errors)["p50"] if errors else None
