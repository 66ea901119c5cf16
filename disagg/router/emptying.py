"""Which answers of a draining worker go where, and when. Pure: time is an argument; the router performs it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from disagg.router.moving import MovableRequest
from disagg.router.pairing import kv_format, traits_difference
from disagg.router.registry import Registry, Worker, WorkerState
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.purposes import MOVE

log = logging.getLogger(__name__)

MOVES_AT_ONCE: Final = 4
"""From one worker. Each holds its answer still while its bytes land, and more at once share one wire: all would only
stand still for longer."""


class Emptying:
    """Chooses among the live requests of draining workers. `num_answers`: being decoded, per incarnation."""

    def __init__(self, registry: Registry, num_answers: Mapping[str, int]) -> None:
        self._registry, self._num_answers = registry, num_answers
        self._told: set[str] = set()
        """Draining workers of which it was said that no other takes their answers."""

    def draining(self, now: float) -> list[Worker]:
        """Workers that are to be emptied."""
        found = [worker for worker in self._registry if worker.state(now) is WorkerState.DRAINING]
        self._told &= {worker.incarnation for worker in found}
        return found

    def moves(
        self, worker: Worker, requests: Iterable[MovableRequest], now: float
    ) -> Iterator[tuple[MovableRequest, PeerTarget]]:
        """Answers of `worker` that may go now, each with its sink; begin each before the next is asked for."""
        own = [request for request in requests if request.server == worker.incarnation]
        room = MOVES_AT_ONCE - sum(request.is_moving for request in own)
        for request in own:
            if room > 0 and request.may_move(now, is_pressing=True):
                if (sink := self.sink_for(worker, request.avoided_sink, now)) is None:
                    return self._tell(worker, len(own))
                room -= 1
                yield request, sink.target
        return None

    def sink_for(self, source: Worker, avoided: str, now: float) -> Worker | None:
        """The least loaded worker that can go on with answers of `source`; `avoided` only where there is no other."""
        able = [worker for worker in self._registry if _can_take_over(source, worker, now)]
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
