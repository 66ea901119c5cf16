"""The legal ways to serve one request, each with its estimate.

prefill pair      a worker computes the prompt, from its own prefix or one fetched from X; another one decodes
computed there    the worker that will decode computes the prompt itself, again from either prefix

time to first token = queue + prefix bytes / GB/s + a step + tokens to compute / rate + KV bytes / GB/s + latencies
cost                = that, + what answers wait longer where the prompt is computed, + what its answer costs there
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from disagg.router.costs.kv_shape import KvShape
from disagg.router.costs.rates import Links, Rates

MAX_PUT_OFF: Final = 0.25
"""A sink puts computing off for a quarter of its computing time at most: a fetch that takes longer is given up."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that could take part. `name`: its incarnation, or whatever tells workers apart.

    `queue_s`: until it begins the next prompt; `room_s`: until it has room for another answer. `num_answers`: that it
    decodes now. `num_requests`: placed there and not seen end.
    """

    name: str
    role: str
    kv: KvShape
    rates: Rates
    queue_s: float = 0.0
    room_s: float = 0.0
    num_answers: int = 0
    num_requests: int = 0

    def __post_init__(self) -> None:
        if self.role not in ("prefill", "decode", "both"):
            raise ValueError(f"role: {self.role}, expected prefill, decode or both")
        for name, value in (("queue_s", self.queue_s), ("room_s", self.room_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value}, expected a duration")


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request needs. `held`: by worker, the tokens of the prompt from which it could go on at once.

    `expected_tokens`: of its answer; no more than `max_tokens`. `max_local_prefill`: see `legal_ways`.
    """

    num_tokens: int
    max_tokens: int
    expected_tokens: float = 1.0
    held: Mapping[str, int] = field(default_factory=dict)
    max_local_prefill: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.max_tokens < 1:
            raise ValueError(f"num_tokens, max_tokens: {self.num_tokens}, {self.max_tokens}, expected at least 1 each")


@dataclass(frozen=True, slots=True)
class Start:
    """The prompt at the worker that computes it, from `boundary` on: its own prefix, or one fetched from `source`."""

    worker: Candidate
    boundary: int
    num_computed: int
    compute_s: float
    source: str | None = None
    fetch_s: float = 0.0
    fetched_nbytes: int = 0

    @property
    def ready_s(self) -> float:
        return self.worker.queue_s + self.fetch_s + self.compute_s

    @property
    def delay_s(self) -> float:
        """What the answers that this worker decodes wait longer, all together."""
        return self.worker.num_answers * self.num_computed / self.worker.rates.prefill_tokens_per_s


@dataclass(frozen=True, slots=True)
class Landing:
    """The answer at the worker that decodes it, and what is moved there first."""

    worker: Candidate
    decode_s: float
    nbytes: int = 0
    handoff_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve a request. `is_local`: the prompt is computed where its answer is decoded."""

    start: Start
    landing: Landing

    @property
    def is_local(self) -> bool:
        return self.start.worker is self.landing.worker

    @property
    def ttft_s(self) -> float:
        """Estimated, from dispatch to the first token."""
        return max(self.start.ready_s, self.landing.worker.room_s) + self.landing.handoff_s

    @property
    def cost_s(self) -> float:
        """Seconds that clients wait: this one for its tokens, others longer for theirs."""
        return self.ttft_s + self.start.delay_s + self.landing.decode_s

    @property
    def num_requests(self) -> int:
        """Placed at the workers of this way."""
        there = 0 if self.is_local else self.landing.worker.num_requests
        return self.start.worker.num_requests + there


def legal_ways(ask: Ask, candidates: Sequence[Candidate], links: Links) -> Iterator[Way]:
    """All of them, pairs first.

    An answer of one token is computed by a worker that computes prompts, alone. Where others decode, which is always
    so at a worker of role `decode`, at most `max_local_prefill` tokens of a prompt are computed.
    """
    starts = [start for worker in candidates for start in _starts_at(ask, worker, links)]
    if ask.max_tokens > 1:
        yield from _pairs(ask, starts, candidates, links)
    for start in starts:
        if _may_serve_alone(ask, start):
            yield Way(start, Landing(start.worker, _decode_s(ask, start.worker)))


def _pairs(ask: Ask, starts: Sequence[Start], candidates: Sequence[Candidate], links: Links) -> Iterator[Way]:
    sinks = [(worker, _decode_s(ask, worker)) for worker in candidates if worker.role != "prefill"]
    nbytes_of: dict[tuple[int, int], int] = {}
    for worker, its_starts in groupby(starts, lambda start: start.worker):
        if worker.role != "decode":
            landings = list(_handoffs(ask, worker, sinks, links, nbytes_of))
            yield from (Way(start, landing) for start in its_starts for landing in landings)


def _starts_at(ask: Ask, worker: Candidate, links: Links) -> Iterator[Start]:
    """Its own prefix first, then that of each worker which holds more of the prompt and is worth the wait."""
    own = worker.kv.usable(ask.num_tokens, ask.held.get(worker.name, 0))
    alone = _start(ask, worker, own)
    yield alone
    for source, held in ask.held.items():
        boundary = worker.kv.usable(ask.num_tokens, held)
        if source == worker.name or boundary <= own:
            continue
        link = links(source, worker.name)
        if link is None or not link.fetches:
            continue
        nbytes = worker.kv.moved_nbytes(boundary, own)
        fetch_s = link.seconds(nbytes)
        if fetch_s <= MAX_PUT_OFF * alone.compute_s:
            yield _start(ask, worker, boundary, source, fetch_s, nbytes)


def _start(
    ask: Ask, worker: Candidate, boundary: int, source: str | None = None, fetch_s: float = 0.0, nbytes: int = 0
) -> Start:
    num_computed = ask.num_tokens - boundary
    compute_s = worker.rates.prompt_step_s + num_computed / worker.rates.prefill_tokens_per_s
    return Start(worker, boundary, num_computed, compute_s, source, fetch_s, nbytes)


def _handoffs(
    ask: Ask,
    source: Candidate,
    sinks: Sequence[tuple[Candidate, float]],
    links: Links,
    nbytes_of: dict[tuple[int, int], int],
) -> Iterator[Landing]:
    """Each sink that is linked decodes what `source` computed. `nbytes_of`: by shape and by what a sink holds."""
    for sink, decode_s in sinks:
        link = links(source.name, sink.name) if source is not sink else None
        if link is not None and link.hands_over:
            held = ask.held.get(sink.name, 0)
            if (nbytes := nbytes_of.get((id(source.kv), held))) is None:
                nbytes = source.kv.moved_nbytes(ask.num_tokens, source.kv.usable(ask.num_tokens, held))
                nbytes_of[id(source.kv), held] = nbytes
            yield Landing(sink, decode_s, nbytes, link.seconds(nbytes))


def _may_serve_alone(ask: Ask, start: Start) -> bool:
    if ask.max_tokens == 1:
        return start.worker.role != "decode"
    if start.worker.role == "prefill":
        return False
    others_decode = start.worker.role == "decode" or start.worker.num_answers > 0
    return not others_decode or start.num_computed <= ask.max_local_prefill


def _decode_s(ask: Ask, worker: Candidate) -> float:
    """Of the tokens after the first."""
    return max(0.0, ask.expected_tokens - 1) * worker.rates.answer_seconds(worker.num_answers)
