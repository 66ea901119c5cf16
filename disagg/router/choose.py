"""Which workers serve a request: the least loaded compatible ones, in turn where loads are equal. Pure.

Load is the router's own count of the requests it has placed and not seen end: unlike a figure from a lease it is
never old, so a burst spreads at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from disagg.router.pairing import pair_difference
from disagg.router.registry import Worker, WorkerState
from disagg.transceiver.wire.messages.router import PeerTarget

RETRY_WORKER_S = 2.0
"""Retry-After when a worker is missing: a supervised one is back after its first backoff and a model load."""
RETRY_BUSY_S = 1.0
"""Retry-After when queues are full: the smallest whole second the header can say; queues drain many times faster."""

_RANK = {WorkerState.READY: 0, WorkerState.SUSPECT: 1}
_LINK_RANK = {"ready": 0, "suspect": 1}


@dataclass(frozen=True, slots=True)
class Placement:
    """`server` emits the tokens. With `prefill` its KV comes from there; without, it computes the prompt itself."""

    server: PeerTarget
    prefill: PeerTarget | None = None


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """Nobody can take the request now, with the reason and when to ask again."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers at one moment. `load`: requests placed per incarnation; `turn` breaks ties, one higher per choice.

    A suspect worker or link is used only when there is no ready one: it may just be starved of CPU, and a request
    on it is retried if it turns out to be lost.
    """

    workers: Sequence[Worker]
    now: float
    load: Mapping[str, int]
    turn: int = 0
    max_queued: int = 1024

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
        """A pair, or a `both` worker where no pair exists. An answer of one token needs no transfer, hence no pair."""
        if max_tokens == 1:
            return self._alone(("prefill", "both"), exclude) or self._unplaceable(exclude)
        return self._pair(exclude) or self._alone(("both",), exclude) or self._unplaceable(exclude)

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None:
        """Another prefill worker for a request whose destinations already lie at incarnation `decode`."""
        server = next((worker for worker in self.workers if worker.incarnation == decode), None)
        if server is None:
            return None
        sources = [(w, server) for w in self._open(("prefill",), exclude) if link_rank(w, server) is not None]
        return self._least(sources)[0].target if sources else None

    def _pair(self, exclude: frozenset[str]) -> Placement | None:
        pairs = product(self._open(("prefill",), exclude), self._open(("decode",), exclude))
        linked = [(p, d) for p, d in pairs if link_rank(p, d) is not None]
        if not linked:
            return None
        prefill, decode = self._least(linked)
        return Placement(decode.target, prefill.target)

    def _alone(self, roles: Iterable[str], exclude: frozenset[str]) -> Placement | None:
        able = [(worker,) for worker in self._open(roles, exclude)]
        return Placement(self._least(able)[0].target) if able else None

    def _open(self, roles: Iterable[str], exclude: frozenset[str]) -> list[Worker]:
        return [w for w in self._live(roles, exclude) if self._num_waiting(w) < self.max_queued]

    def _live(self, roles: Iterable[str], exclude: frozenset[str]) -> list[Worker]:
        return [
            w for w in self.workers if w.role in roles and w.incarnation not in exclude and self._rank(w) is not None
        ]

    def _rank(self, worker: Worker) -> int | None:
        return _RANK.get(worker.state(self.now))

    def _num_waiting(self, worker: Worker) -> int:
        """Placed and not running: a lease is at most a heartbeat old, the count of what was placed never."""
        return self.load.get(worker.incarnation, 0) - worker.lease.num_running

    def _least(self, options: Sequence[tuple[Worker, ...]]) -> tuple[Worker, ...]:
        def cost(numbered: tuple[int, tuple[Worker, ...]]) -> tuple[int, int, int]:
            index, option = numbered
            health = sum(self._rank(worker) or 0 for worker in option)
            if len(option) == 2:
                health += link_rank(*option) or 0
            load = sum(self.load.get(worker.incarnation, 0) for worker in option)
            return health, load, (index - self.turn) % len(options)

        return min(enumerate(options), key=cost)[1]

    def _unplaceable(self, exclude: frozenset[str]) -> Unplaceable:
        live = self._live(("prefill", "decode", "both"), exclude)
        if any(self._num_waiting(worker) >= self.max_queued for worker in live):
            return Unplaceable(f"every worker has {self.max_queued} requests waiting", RETRY_BUSY_S)
        return Unplaceable(_missing(live), RETRY_WORKER_S)


def link_rank(prefill: Worker, decode: Worker) -> int | None:
    """0 for a ready link, 1 for a suspect one, None when KV cannot go from `prefill` to `decode` now."""
    if pair_difference(prefill.register, decode.register):
        return None
    return _LINK_RANK.get(decode.link_state(prefill.incarnation))


def why_apart(prefill: Worker, decode: Worker) -> str:
    names = f"prefill worker `{prefill.worker_id}` and decode worker `{decode.worker_id}`"
    if difference := pair_difference(prefill.register, decode.register):
        return f"{names} differ in {difference}"
    return f"{names} are not connected: {decode.link_state(prefill.incarnation)}"


def _missing(live: Sequence[Worker]) -> str:
    prefills = [worker for worker in live if worker.role == "prefill"]
    decodes = [worker for worker in live if worker.role == "decode"]
    if not prefills:
        return "no prefill worker is available; is `disagg prefill` running?"
    if not decodes:
        return "no decode worker is available; is `disagg decode` running?"
    return "; ".join(why_apart(p, d) for p, d in product(prefills, decodes))
