"""Which answers leave a worker that drains, or is short of blocks, and where to. Pure: time is an argument."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from disagg.router.attempt_events import Action
from disagg.router.moving import MovableRequest
from disagg.router.pairing import kv_format, traits_difference
from disagg.router.registry import Registry, Worker, WorkerState
from disagg.transceiver.wire.purposes import MOVE

log = logging.getLogger(__name__)

MOVES_AT_ONCE: Final = 4
"""From one worker. Each holds its answer still while its bytes land, and more at once share one wire: all would only
stand still for longer."""

FREE_SHARE: Final = 0.5
"""Of each pool of a worker that is to relieve another: with less it would be the next that is short of blocks."""


Orders = Iterator[tuple[MovableRequest, list[Action]]]
"""What to carry out for each request, in turn: the next is chosen when that is done."""


class Emptying:
    """Chooses among live requests. `num_answers`: being decoded, per incarnation; `draw`: an id for each move."""

    def __init__(self, registry: Registry, num_answers: Mapping[str, int], draw: Callable[[], str]) -> None:
        self._registry, self._num_answers, self._draw = registry, num_answers, draw
        self._told: set[str] = set()
        """Draining workers of which it was said that no other takes their answers."""

    def empty(self, requests: Callable[[], Iterable[MovableRequest]], now: float) -> Orders:
        """Take from draining workers what others can have: answers move, what has no token is placed anew."""
        draining = [worker for worker in self._registry if worker.state(now) is WorkerState.DRAINING]
        self._told &= {worker.incarnation for worker in draining}
        for worker in draining:
            own = [request for request in requests() if request.server == worker.incarnation]
            for request in own:
                yield request, request.leave(now)
            yield from self._moves(worker, own, now)

    def relieve(self, incarnation: str, pressed: Iterable[MovableRequest], now: float) -> Orders:
        """Move answers that their worker would preempt next, where another has room for them."""
        source = self._registry.get(incarnation)
        for request in pressed:
            if source is None or request.server != incarnation or not request.may_move(now, is_pressing=False):
                continue
            if (sink := self.sink_for(source, request.avoided_sink, now, with_room=True)) is not None:
                yield request, request.move(sink.target, self._draw(), now)

    def _moves(self, worker: Worker, own: Sequence[MovableRequest], now: float) -> Orders:
        room = MOVES_AT_ONCE - sum(request.is_moving for request in own)
        for request in own:
            if room > 0 and request.may_move(now, is_pressing=True):
                if (sink := self.sink_for(worker, request.avoided_sink, now)) is None:
                    return self._tell(worker, len(own))
                room -= 1
                yield request, request.move(sink.target, self._draw(), now)
        return None

    def sink_for(self, source: Worker, avoided: str, now: float, *, with_room: bool = False) -> Worker | None:
        """The least loaded worker that can go on with answers of `source`; `avoided` only where there is no other.

        `with_room`: its pools have ample room by its last lease; without, it may find that it has none.
        """
        able = [w for w in self._registry if _can_take_over(source, w, now) and (not with_room or _has_room(w))]
        return min(able, key=lambda w: self._cost(source, w, avoided), default=None)

    def _cost(self, source: Worker, sink: Worker, avoided: str) -> tuple[bool, bool, int]:
        """Of equals the one with the fewest answers; a link that is not there yet takes a moment to make."""
        is_linked = sink.link_state(source.incarnation) == "ready"
        return sink.incarnation == avoided, not is_linked, self._num_answers.get(sink.incarnation, 0)

    def _tell(self, worker: Worker, num_answers: int) -> None:
        if worker.incarnation not in self._told:
            self._told.add(worker.incarnation)
            why = "no other worker can take its answers over: they finish where they are"
            log.warning("worker `%s` drains with %d requests, and %s", worker.worker_id, num_answers, why)


def _can_take_over(source: Worker, sink: Worker, now: float) -> bool:
    """Both serve moves, and store KV in one format: then nothing is rounded on the way."""
    return (
        sink is not source
        and MOVE in source.sends
        and MOVE in sink.receives
        and sink.state(now) is WorkerState.READY
        and sink.link_state(source.incarnation) in ("ready", "connecting")
        and kv_format(sink.register.geometry) == kv_format(source.register.geometry)
        and traits_difference(source.traits, sink.traits) is None
    )


def _has_room(sink: Worker) -> bool:
    lease = sink.lease
    pools = zip(lease.blocks_used, lease.blocks_free, strict=False)
    return bool(lease.blocks_free) and all(free >= FREE_SHARE * (used + free) for used, free in pools)
