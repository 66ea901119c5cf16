"""Answers of this worker that the router lets another one fetch.

The answer goes on here until its FETCH is admitted, then stands still. It is over here when the sink has acknowledged
it. After any other end of the transfer the router is told, and until it says RESUME or CANCEL nothing happens: the sink
may have the answer already, and two workers must never go on with one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from disagg.engine.commands import AttemptKey, Command, Freeze, FrozenEvent, MoveRefusedEvent, Release, Thaw
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.protocol.events import CancelAsked, ComputeFailed, Event, FinishedEarly, Frozen
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages.peer import MAX_UNTOLD
from disagg.transceiver.wire.messages.router import Dispatch, Grant, TransferFailure
from disagg.transceiver.wire.messages.values import Geometry
from disagg.worker.pairing import Pairing

log = logging.getLogger(__name__)

ACKED = "acked"
"""The reason of a release with which the sink has taken the answer over."""


@dataclass(frozen=True, slots=True)
class Departure:
    """`key`: of the attempt that answers here. `num_told`: tokens that the router had when it let the answer go."""

    key: AttemptKey
    seed: int
    num_told: int
    pairing: Pairing


class Departures:
    """By leg, the transfer's own (id, epoch). Of one registration, on its event loop."""

    def __init__(
        self,
        submit: Callable[[Command], None],
        report: Callable[[TransferFailure], None],
        pair: Callable[[Dispatch], Pairing],
        side: Callable[[], SendingSide | None],
    ) -> None:
        self._submit, self._report, self._pair, self._side = submit, report, pair, side
        self._by_leg: dict[AttemptKey, Departure] = {}

    def __contains__(self, leg: AttemptKey) -> bool:
        return leg in self._by_leg

    def leg_of(self, key: AttemptKey) -> AttemptKey | None:
        """Of an attempt that may leave."""
        return next((leg for leg, departure in self._by_leg.items() if departure.key == key), None)

    def attempt(self, leg: AttemptKey) -> AttemptKey | None:
        """Of a leg that is open."""
        departure = self._by_leg.get(leg)
        return None if departure is None else departure.key

    def peer_geometry(self, leg: AttemptKey) -> Geometry:
        return self._by_leg[leg].pairing.peer_geometry

    # --- from the router --------------------------------------------------------------------------------------

    def grant(self, grant: Grant, key: AttemptKey, dispatch: Dispatch) -> None:
        """The sink may fetch the answer that `dispatch` asked this worker for."""
        side, leg = self._side(), AttemptKey(grant.transfer_id, grant.epoch)
        own = {"transfer_id": grant.transfer_id, "epoch": grant.epoch, "peer": grant.sink, "deadline_s": grant.ttl_s}
        pairing = self._pair(replace(dispatch, mode="prefill", output=(), **own))  # type: ignore[arg-type]  # by name
        if side is None or side.knows(leg) or not pairing.fits or pairing.precision:
            log.warning("an answer of %s cannot be sent to `%s`", key.transfer_id, grant.sink.worker_id)
            return
        self.forget(key, CancelAsked("another worker may have the answer"))
        self._by_leg[leg] = Departure(key, dispatch.sampling.seed, grant.num_tokens, pairing)
        side.start(leg, pairing.move_source(grant.request, grant.num_tokens))

    def resume(self, key: AttemptKey) -> None:
        """The answer goes on here, whatever has become of its transfer."""
        self.forget(key, CancelAsked("resumed"))
        self._submit(Thaw(key))

    def forget(self, key: AttemptKey, event: Event) -> None:
        """End the transfer of this attempt, if it has one, without a word to the router, which knows."""
        if (leg := self.leg_of(key)) is not None:
            del self._by_leg[leg]
            self._feed(leg, event)

    # --- from the engine --------------------------------------------------------------------------------------

    def froze(self, event: FrozenEvent) -> AttemptKey | None:
        """Tell the sink how far the answer has come. Returns the leg whose units are to be hashed."""
        leg = self.leg_of(event.key)
        if leg is None or leg.transfer_id != event.leg:
            return None  # the router has taken it back meanwhile
        departure = self._by_leg[leg]
        num_untold = len(event.output) - departure.num_told
        if not 0 <= num_untold <= MAX_UNTOLD:
            self._feed(leg, ComputeFailed(f"the router is {num_untold} tokens behind, {MAX_UNTOLD} may be"))
            return None
        logprobs = event.logprobs[len(event.logprobs) - num_untold :]
        self._feed(leg, Frozen(event.output, logprobs, departure.seed))
        return leg

    def refuse(self, event: MoveRefusedEvent) -> None:
        self.end(event.key, ComputeFailed(event.reason))

    def finish(self, key: AttemptKey) -> None:
        """The answer ended before it stood still: nothing is left to be fetched."""
        self.end(key, FinishedEarly(0))

    def end(self, key: AttemptKey, event: Event) -> None:
        """End the transfer of this attempt, if it has one; what that means for the answer, `release` says."""
        if (leg := self.leg_of(key)) is not None:
            self._feed(leg, event)

    # --- from the transfers -----------------------------------------------------------------------------------

    def pin(self, leg: AttemptKey) -> None:
        self._submit(Freeze(self._by_leg[leg].key, leg.transfer_id))

    def release(self, leg: AttemptKey, reason: str) -> AttemptKey | None:
        """The transfer is over. Returns the attempt that is over here with it; of another end the router is told."""
        departure = self._by_leg.pop(leg)
        key = departure.key
        if reason == ACKED:
            self._submit(Release(key))
            return key
        if reason != reasons.FINISHED:
            log.warning("the move of %s failed: %s", key.transfer_id, reason)
            self._report(TransferFailure(key.transfer_id, key.epoch, reason))
        return None

    def _feed(self, leg: AttemptKey, event: Event) -> None:
        if (side := self._side()) is not None:
            side.feed(leg, event)
