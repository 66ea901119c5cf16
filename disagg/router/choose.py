"""Which workers serve a request: the least loaded compatible ones, in turn where loads are equal. Pure.

Load is the router's own count of the requests it has placed and not seen end: unlike a figure from a lease it is
never old, so a burst spreads at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Final

from disagg.router.costs.ways import Way
from disagg.router.pairing import KvFormat, kv_format, traits_difference
from disagg.router.registry import Worker, WorkerState
from disagg.transceiver.wire.messages.router import PeerTarget

RETRY_WORKER_S = 2.0
"""Retry-After when a worker is missing: a supervised one is back after its first backoff and a model load."""
RETRY_BUSY_S = 1.0
"""Retry-After when queues are full: the smallest whole second the header can say; queues drain many times faster."""

MAX_PAIRS_TOLD: Final = 4
"""Of a fleet without one connected pair, in a sentence for a client: two by two, which a person can still read."""

_RANK = {WorkerState.READY: 0, WorkerState.SUSPECT: 1}
_LINK_RANK = {"ready": 0, "idle": 0, "suspect": 1}
_WORST: Final = 4
"""Above the rank of any pair: two suspect workers with a suspect link between them make 3."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`server` emits the tokens. With `prefill` its KV comes from there; without, it computes the prompt itself.

    `way`: how it was estimated, where it was.
    """

    server: PeerTarget
    prefill: PeerTarget | None = None
    way: Way | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No worker can take the request now, with the reason and when to ask again."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers at one moment. `load`: requests placed per incarnation; `turn` breaks ties, one higher per choice.

    A suspect worker or link is used only when there is no ready one: it may just be starved of CPU, and a request
    on it is retried if it turns out to be lost. A choice looks at each worker once and at pairs in the order of their
    load until one is linked, which with all of them linked is the first.
    """

    workers: Iterable[Worker]
    now: float
    load: Mapping[str, int]
    turn: int = 0
    max_queued: int = 1024

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
        """A pair, or a `both` worker where no pair exists. An answer of one token needs no transfer, hence no pair."""
        if max_tokens == 1:
            return self._alone(("prefill", "both"), exclude) or self._unplaceable(exclude)
        return self._pair(exclude) or self._alone(("both",), exclude) or self._unplaceable(exclude)

    def alone(self, exclude: frozenset[str]) -> Placement | Unplaceable:
        """A worker that computes a prompt and its answer itself, though it may be there to decode what others send."""
        return self._alone(("decode", "both"), exclude) or self._unplaceable(exclude)

    def unfit(self, kv: KvFormat | None) -> frozenset[str]:
        """Workers that cannot go on with an answer begun elsewhere; given `kv`, also those that store KV otherwise."""
        return frozenset(
            w.incarnation
            for w in self.workers
            if not w.goes_on or (kv is not None and kv_format(w.register.geometry) != kv)
        )

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None:
        """Another prefill worker for a request whose destinations already lie at incarnation `decode`."""
        server = [worker for worker in self.workers if worker.incarnation == decode]
        prefills = self._in_order(self._open(("prefill",), exclude), self.turn)
        best = _best_pair(prefills, [(0, 0, worker) for worker in server])
        return None if best is None else best[0].target

    def _pair(self, exclude: frozenset[str]) -> Placement | None:
        prefills = self._open(("prefill",), exclude)
        decodes = self._open(("decode",), exclude)
        turn = self.turn // max(1, len(decodes))  # each prefill worker meets every decode worker before the next
        best = _best_pair(self._in_order(prefills, turn), self._in_order(decodes, self.turn))
        return None if best is None else Placement(best[1].target, best[0].target)

    def _alone(self, roles: Collection[str], exclude: frozenset[str]) -> Placement | None:
        able = self._in_order(self._open(roles, exclude), self.turn)
        return Placement(able[0][2].target) if able else None

    def _in_order(self, workers: Sequence[Worker], turn: int) -> list[_Option]:
        """The healthiest first, then the least loaded, then whose turn it is."""
        first = turn % max(1, len(workers))
        turned = (*workers[first:], *workers[:first])
        options = [(self._rank(worker) or 0, self.load.get(worker.incarnation, 0), worker) for worker in turned]
        return sorted(options, key=lambda option: option[:2])

    def _open(self, roles: Collection[str], exclude: frozenset[str]) -> list[Worker]:
        return [w for w in self._live(roles, exclude) if self._num_waiting(w) < self.max_queued]

    def _live(self, roles: Collection[str], exclude: frozenset[str]) -> list[Worker]:
        return [
            w for w in self.workers if w.role in roles and w.incarnation not in exclude and self._rank(w) is not None
        ]

    def _rank(self, worker: Worker) -> int | None:
        return _RANK.get(worker.state(self.now))

    def _num_waiting(self, worker: Worker) -> int:
        """Placed and not running: a lease is at most a heartbeat old, the count of what was placed never."""
        return self.load.get(worker.incarnation, 0) - worker.lease.num_running

    def _unplaceable(self, exclude: frozenset[str]) -> Unplaceable:
        live = self._live(("prefill", "decode", "both"), exclude)
        if any(self._num_waiting(worker) >= self.max_queued for worker in live):
            return Unplaceable(f"every worker has {self.max_queued} requests waiting", RETRY_BUSY_S)
        return Unplaceable(_missing(live), RETRY_WORKER_S)


_Option = tuple[int, int, Worker]
"""(rank, load, worker)"""


def _best_pair(prefills: Sequence[_Option], decodes: Sequence[_Option]) -> tuple[Worker, Worker] | None:
    """The linked pair of the lowest (rank, load), both summed; of equals the first. Both come in that order."""
    best: tuple[Worker, Worker] | None = None
    best_cost = (_WORST, 0)
    places = {option[2].incarnation: place for place, option in enumerate(prefills)}
    for decode_rank, decode_load, decode in decodes:
        if not prefills or (decode_rank + prefills[0][0], decode_load + prefills[0][1]) >= best_cost:
            break  # not even with the best prefill worker
        for prefill_rank, prefill_load, prefill in _within_reach(prefills, places, decode):
            rank, load = prefill_rank + decode_rank, prefill_load + decode_load
            if (rank, load) >= best_cost:
                break  # what follows of this rank costs no less, and of the next rank more
            link = link_rank(prefill, decode)
            if link is None or (rank + link, load) >= best_cost:
                continue
            best, best_cost = (prefill, decode), (rank + link, load)
            if link == 0:
                break  # as above
    return best


def _within_reach(prefills: Sequence[_Option], places: Mapping[str, int], decode: Worker) -> Sequence[_Option]:
    """In order; where a decode worker has few links and makes no others, only what they lead to, not all pairs."""
    if decode.is_linked_on_use or len(decode.link_reports) >= len(prefills):
        return prefills
    return [prefills[place] for place in sorted(places[peer] for peer in decode.link_reports if peer in places)]


def link_rank(prefill: Worker, decode: Worker) -> int | None:
    """0 for a ready link or one that a request makes, 1 for a suspect one, None when no KV can go this way now."""
    state = _LINK_RANK.get(decode.link_state(prefill.incarnation))
    return None if state is None or traits_difference(prefill.traits, decode.traits) else state


def why_apart(prefill: Worker, decode: Worker) -> str:
    names = f"prefill worker `{prefill.worker_id}` and decode worker `{decode.worker_id}`"
    if difference := traits_difference(prefill.traits, decode.traits):
        return f"{names} differ in {difference}"
    return f"{names} are not connected: {decode.link_state(prefill.incarnation)}"


def _missing(live: Sequence[Worker]) -> str:
    prefills = [worker for worker in live if worker.role == "prefill"]
    decodes = [worker for worker in live if worker.role == "decode"]
    if not prefills:
        return "no prefill worker is available; is `disagg prefill` running?"
    if not decodes:
        return "no decode worker is available; is `disagg decode` running?"
    told = "; ".join(why_apart(p, d) for p, d in islice(product(prefills, decodes), MAX_PAIRS_TOLD))
    num_more = len(prefills) * len(decodes) - MAX_PAIRS_TOLD
    return f"{told}; and {num_more} more pairs" if num_more > 0 else told
