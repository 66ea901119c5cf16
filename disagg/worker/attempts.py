"""The attempts dispatched to this worker: routes the router's messages to engine and transfers, and answers back.

    router message -> take_message -> engine command, transfer event
    engine event   -> take_event   -> transfer event, message to the router
    transfer action -> the host methods (pin, release_source, decode, ...) -> engine command, message to the router

Synchronous throughout: nothing here waits, and every path of an attempt ends in a `Release` or in the engine's own end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from disagg.engine.commands import (
    AttemptKey,
    Command,
    Decode,
    DropChoice,
    DropSoft,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    FrozenEvent,
    MoveRefusedEvent,
    Pin,
    PinnedEvent,
    Prefill,
    PrefixEvictedEvent,
    PrefixRoomEvent,
    PrefixWantedEvent,
    PressedEvent,
    PromptComputedEvent,
    PromptScoredEvent,
    Release,
    Reserve,
    ReservedEvent,
    SoftDroppedEvent,
    TokensEvent,
    Unregister,
)
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.actions import AskExtension, ReportFailed, Verified
from disagg.transceiver.protocol.events import (
    CancelAsked,
    ComputeFailed,
    FinishedEarly,
    Pinned,
    PromptComputed,
    SoftDropped,
)
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import clipped
from disagg.transceiver.wire.messages.router import (
    CancelChoice,
    CancelRequest,
    Dispatch,
    Finished,
    Grant,
    Peers,
    PeerTarget,
    PrefillLocally,
    PromptScores,
    RequestFailed,
    Resume,
    Retarget,
    RouterMessage,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import Geometry, StageTimes, UnitName, nameable
from disagg.worker.arrivals import Arrivals
from disagg.worker.departures import Departures
from disagg.worker.live_attempts import LiveAttempts
from disagg.worker.metrics import WorkerMetrics
from disagg.worker.pairing import Pairing
from disagg.worker.prefix_sinks import PrefixSinks
from disagg.worker.prefix_sources import PrefixSources
from disagg.worker.request_state import RequestState
from disagg.worker.serves import serves_of
from disagg.worker.stages import report_of, stage_times
from disagg.worker.taking_in import OnFault, Slots

log = logging.getLogger(__name__)

NO_ROOM_S: Final = 1.0
"""Long against a step and a transfer, which may give room at any moment, short against a client's patience."""


class Attempts(LiveAttempts):
    """All live attempts of one registration; host of its sending and receiving sides."""

    def __init__(
        self,
        submit: Callable[[Command], None],
        send: Callable[[RouterMessage | Tokens], None],
        pair: Callable[[Dispatch], Pairing],
        metrics: WorkerMetrics,
        *,
        fetch_wait_s: float,
        decode: Callable[[Decode, Slots, OnFault], None] | None = None,
        on_pressed: Callable[[], None] = lambda: None,
        lacks_floor: Callable[[], bool] = lambda: False,
    ) -> None:
        """`decode`: takes a `Decode` with the slots whose KV landed; without it they are there already. `on_pressed`:
        there is something for `take_pressed`. `lacks_floor`: whether reservations are held here in pools that keep no
        room for what others fetch.
        """
        super().__init__()
        self._lacks_floor = lacks_floor
        self._decode = decode or (lambda command, slots, on_fault: submit(command))
        self._submit, self._pair, self._metrics = submit, pair, metrics
        self._tell, self._on_pressed = send, on_pressed
        self._departures = Departures(submit, self._send, pair, lambda: self.sending)
        self._arrivals = Arrivals(submit, pair, lambda: self.receiving)
        self._fetch_wait_s = fetch_wait_s
        self._peers: dict[str, PeerTarget] = {}
        self.sources: PrefixSources | None = None
        self.sinks: PrefixSinks | None = None

    def peer_geometry(self, key: AttemptKey) -> Geometry:
        """How the peer of a live attempt's transfer, or of a leg, lays out its cache."""
        if key in self._departures:
            return self._departures.peer_geometry(key)
        return self._live[key].pairing.peer_geometry

    def froze(self, event: FrozenEvent) -> AttemptKey | None:
        """An answer stands still. The leg for which its units are to be hashed now, if it is wanted still."""
        return self._departures.froze(event) if event.key in self._live else None

    def _send(self, message: RouterMessage | Tokens) -> None:
        """To the router, under the epoch by which it knows the attempt now."""
        state = self._live.get(AttemptKey(getattr(message, "transfer_id", ""), getattr(message, "epoch", 0)))
        if state is not None and state.epoch != state.dispatch.epoch:
            message = replace(message, epoch=state.epoch)  # type: ignore[arg-type]  # it has one: it was found by it
        self._tell(message)

    # --- from the router --------------------------------------------------------------------------------------

    def take_message(self, message: RouterMessage) -> None:
        match message:
            case Dispatch():
                self._dispatch(message)
            case Retarget(transfer_id=transfer_id, epoch=epoch, peer=peer, ticket=ticket):
                self._again(transfer_id, epoch, mode="decode", peer=peer, ticket=ticket)
            case PrefillLocally(transfer_id, epoch):
                self._again(transfer_id, epoch, mode="serve", peer=None)
            case CancelRequest(transfer_id=transfer_id, epoch=epoch, reason=reason):
                for key in [key for key in self._live if key.transfer_id == transfer_id and key.epoch <= epoch]:
                    self.cancel(key, reason)
                self._drop_request(transfer_id)
                if self.sources is not None:
                    self.sources.withdraw(transfer_id, reason)
            case CancelChoice():
                self._cancel_choice(AttemptKey(message.transfer_id, message.epoch, message.choice))
            case Grant(purpose="move"):
                self._let_go(message)
            case Grant() if self.sources is not None:
                self.sources.grant(message)
            case Resume():
                self._resume(message)
            case Peers():
                self._introduce(message)
            case _:
                log.warning("the router sent %s, which no worker takes", type(message).__name__)

    def _introduce(self, change: Peers) -> None:
        for incarnation in change.gone:
            self._peers.pop(incarnation, None)
        self._peers |= {target.incarnation: target for target in change.peers}
        if self.receiving is not None:
            self.receiving.set_peers(self._peers.values())
            self.receiving.forget_peers(change.gone)

    def _dispatch(self, dispatch: Dispatch, *, urgent: bool = False) -> None:
        pairing = self._arrivals.pairing_of(dispatch) if dispatch.mode == "move" else self._pair(dispatch)
        state = RequestState(dispatch, pairing)
        key, sampling, priority = state.key, dispatch.sampling, dispatch.priority
        if key in self._live or self._was_here(key) or self._is_misplaced(state):
            log.warning("ignored a dispatch of mode %s", dispatch.mode, extra=_of(state))
            return
        self._live[key] = state
        self._requests[dispatch.transfer_id] = dispatch
        log.info(
            "%s: %d prompt tokens, attempt %d", dispatch.mode, len(dispatch.prompt), dispatch.epoch, extra=_of(state)
        )
        output = dispatch.first_output
        boundary = self.sinks.expect(state) if self.sinks is not None and dispatch.mode in ("serve", "prefill") else 0
        if dispatch.mode == "serve":
            state.to_follow.extend(serves_of(dispatch, urgent=urgent, arrived_at=state.began_at))
            self._submit(replace(state.to_follow.popleft(), prefix_boundary=boundary))
        elif dispatch.mode == "move":
            self._arrivals.begin(state)
        elif dispatch.mode == "decode":
            named = (key, dispatch.prompt, sampling, state.pairing.precision, priority, output)
            self._submit(Reserve(*named, arrived_at=state.began_at))
            self._reach(dispatch.peer)
        elif self.sending is not None and dispatch.peer is not None:
            # First: a FETCH that came early pins it at once.
            self._submit(Prefill(key, dispatch.prompt, sampling, priority, output, boundary, state.began_at))
            self.sending.start(key, state.pairing.sender())

    def _reach(self, peer: PeerTarget | None) -> None:
        """A peer that no request has named before is connected while the prompt waits for room."""
        if self.receiving is not None and peer is not None:
            self.receiving.reach(peer)

    def _is_misplaced(self, state: RequestState) -> bool:
        mode = state.dispatch.mode
        sides = {"serve": True, "prefill": self.sending, "decode": self.receiving, "move": self.receiving}
        side = sides.get(mode)
        return side is None or not (mode == "serve" or state.pairing.fits)

    def _again(self, transfer_id: str, epoch: int, **change: object) -> None:
        """The next attempt of a request whose last one failed here. The old sequence is gone; a new one is built."""
        last = self._requests.get(transfer_id)
        if last is None:
            self._send(RequestFailed(transfer_id, epoch, 503, "this worker no longer has the request"))
            return
        self._dispatch(replace(last, epoch=epoch, **change), urgent=True)  # type: ignore[arg-type]  # fields of Dispatch, by name

    def _let_go(self, grant: Grant) -> None:
        """Another worker may have an answer of this one, if it is answered here still."""
        if (state := self._newest(grant.request)) is not None:
            self._departures.grant(grant, state.key, state.dispatch)

    def _resume(self, resume: Resume) -> None:
        """The answer goes on here under another epoch, which only names it: what the engine holds it holds."""
        if (state := self._newest(resume.transfer_id)) is None:
            self._send(RequestFailed(resume.transfer_id, resume.epoch, 503, "this worker no longer has the request"))
            return
        state.epoch = resume.epoch
        self._departures.resume(state.key)

    def cancel(self, key: AttemptKey, reason: str) -> None:
        """End an attempt wherever it stands; what a transfer still holds goes when its core says so."""
        self._departures.forget(key, CancelAsked(reason))
        state = self._live.get(key)
        if state is not None and self._arrivals.cancel(state, reason):
            pass  # its room is given back when the transfer has stopped
        elif self.sending is not None and key in self.sending:
            self.sending.feed(key, CancelAsked(reason))
        elif self.receiving is not None and key in self.receiving:
            self.receiving.feed(key, CancelAsked(reason))
        else:
            self._submit(Release(key))
        self._forget(key)

    def _cancel_choice(self, key: AttemptKey) -> None:
        """Of an attempt that answers here: nothing is left of a transfer by then."""
        if (state := self._live.get(key.attempt)) is not None and key.choice < state.dispatch.sampling.num_choices:
            waiting = [serve for serve in state.to_follow if serve.key == key]
            if waiting:
                state.to_follow.remove(*waiting)
            else:
                self._submit(DropChoice(key))
            self._end_choice(state, key)

    def _end_choice(self, state: RequestState, key: AttemptKey) -> None:
        state.ended.add(key.choice)
        self._follow(state, key.choice)
        if state.is_over:
            self._forget(key.attempt)

    def _follow(self, state: RequestState, choice: int) -> None:
        """The known tokens of `choice` are computed, or it is over: the next one that goes on reuses what it can."""
        if state.to_follow and choice == state.in_turn:
            serve = state.to_follow.popleft()
            state.in_turn = serve.key.choice
            self._submit(serve)

    # --- from the engine --------------------------------------------------------------------------------------

    def take_event(self, event: EngineEvent) -> None:
        """What needs no hash, or has had it (see `EngineEvents`)."""
        match event:
            case PrefixEvictedEvent(key) if self.sources is not None:
                return self.sources.evicted(key)
            case PrefixWantedEvent() if self.sinks is not None:
                return self.sinks.wanted(event)
            case PrefixRoomEvent() if self.sinks is not None:
                return self.sinks.room(event)
        return self._take_own(event)

    def _take_own(self, event: EngineEvent) -> None:
        """Of an attempt that is live here."""
        state = self._live.get(event.key.attempt)
        if state is None or event.key.choice in state.ended:  # cancelled meanwhile
            return
        match event:
            case TokensEvent(
                key=key, index=index, token_ids=token_ids, logprobs=logprobs, num_cached_tokens=num_cached_tokens
            ):
                if index == state.begins_at(key.choice):
                    if state.first_token_sent:
                        return
                    self._answer_begins(state, key.choice)
                tokens = Tokens(key.transfer_id, key.epoch, index, token_ids, logprobs, num_cached_tokens, key.choice)
                self._send(tokens)
            case PromptScoredEvent(key, scores):
                self._send(PromptScores(key.transfer_id, key.epoch, scores))
            case FinishedEvent(key=key, index=index, reason=reason, stop_token_id=stop_token_id):
                self._departures.finish(key)
                self._send(Finished(key.transfer_id, key.epoch, index, reason, stop_token_id, key.choice))
                self._end_choice(state, key)
            case FailedEvent(key=key, status=status, message=message):
                if state.dispatch.sampling.num_choices > 1:
                    self._submit(Release(key.attempt))  # the others of its answers end with it
                self._fail(key.attempt, status, message)
            case PressedEvent(key):
                state.is_pressed = True
                self._on_pressed()
            case ReservedEvent(key, slots) if state.dispatch.mode == "move":
                self._arrivals.reserved(state, slots)
            case MoveRefusedEvent() if state.dispatch.mode == "move" and not state.first_token_sent:
                self._arrivals.refuse(state, event)
            case MoveRefusedEvent():
                self._departures.refuse(event)
            case ReservedEvent(key, slots):
                self._start_receiving(state, slots)
            case PinnedEvent(key, compute_id):
                state.has_room = True
                self._feed_sender(key, Pinned(compute_id))
            case SoftDroppedEvent(key, compute_id):
                self._feed_sender(key, SoftDropped(compute_id))
            case PromptComputedEvent():
                self._prompt_computed(state, event)

    def _answer_begins(self, state: RequestState, choice: int) -> None:
        """Its first token of this attempt was computed here."""
        if state.dispatch.mode == "serve" and not state.is_reported:
            state.is_reported = True
            self._report(state, state.since_arrival("prefill"))
        self._follow(state, choice)

    def _start_receiving(self, state: RequestState, slots: Sequence[Sequence[tuple[int, int]]]) -> None:
        peer = state.dispatch.peer
        if self.receiving is None or peer is None:
            return
        state.reserved_at = time.monotonic()
        state.reserved = tuple(tuple(slot for _, slot in pairs) for pairs in slots)
        self.receiving.reach(peer, partial(self._receive, state, peer, slots))

    def _receive(self, state: RequestState, peer: PeerTarget, slots: Sequence[Sequence[tuple[int, int]]]) -> None:
        """The link to the peer is ready, or there is none: either way the transfer's core says what follows."""
        if self.receiving is None or self._live.get(state.key) is not state:  # cancelled while the link was made
            return
        try:
            transfer = state.pairing.receiver(self.receiving.plane_of(peer.incarnation))
            destinations = state.pairing.destinations(slots)
            state.partial_blocks = state.pairing.partial_blocks(destinations)
            reserved = state.pairing.reserved(destinations)
            self.receiving.start(state.key, transfer, peer.incarnation, destinations, reserved)
        except Exception as fault:  # which belongs to this attempt, and not to the link that has just been made
            log.error("a transfer cannot start: %s", clipped(repr(fault)), extra=_of(state), exc_info=fault)
            self.fail(state.key, "a fault of this worker: a transfer cannot start")

    def _prompt_computed(self, state: RequestState, event: PromptComputedEvent) -> None:
        key, first = event.key, event.first_token
        self._report(state, state.since_arrival("prefill"))
        if not event.finished:
            self._feed_sender(key, PromptComputed(event.compute_id, first))
            return
        for tokens in state.first_tokens(first):
            self._send(tokens)
        for choice in range(1 + len(first.others)):
            index = state.begins_at(choice) + 1
            self._send(Finished(key.transfer_id, key.epoch, index, "stop", first.of(choice).token_id, choice))
        self._feed_sender(key, FinishedEarly(event.compute_id))

    def _fail(self, key: AttemptKey, status: int, message: str) -> None:
        self._departures.forget(key, ComputeFailed(message))
        self._send(RequestFailed(key.transfer_id, key.epoch, status, message))
        self._feed_sender(key, ComputeFailed(message))
        self._forget(key)

    def fail(self, key: AttemptKey, message: str) -> None:
        """A fault of this process that belongs to one attempt ends that attempt, for good, and nothing else."""
        key = key.attempt
        self._send(RequestFailed(key.transfer_id, key.epoch, 500, message))
        self.cancel(key, "fault")

    def _feed_sender(self, key: AttemptKey, event: object) -> None:
        if self.sending is not None:
            self.sending.feed(key, event)  # type: ignore[arg-type]  # an event of the sender

    # --- from the transfers -----------------------------------------------------------------------------------

    def pin(self, key: AttemptKey) -> None:
        if key in self._departures:
            self._departures.pin(key)
        elif (state := self._live.get(key)) is not None:
            state.is_pinned, state.pinned_at = True, time.monotonic()
            self._submit(Pin(key))

    def release_source(self, key: AttemptKey, reason: str) -> None:
        log.debug("source released: %s", reason)
        if key in self._departures:
            if (gone := self._departures.release(key, reason)) is not None:
                self._forget(gone)
            return
        if key in self._suspects:
            self._suspects[key] = True
        else:
            self._submit(Release(key))
        self._forget(key)

    def unregister(self, key: AttemptKey, units: Sequence[UnitName]) -> None:
        log.error("the peer's digests disagree for %d blocks of %s: %s", len(units), key.transfer_id, list(units)[:8])
        self._metrics.count_digest_failure(len(units))
        if (answering := self._departures.attempt(key)) is not None:  # it holds its blocks, whatever they are
            self._submit(Unregister(answering, tuple(units)))
            return
        self._suspects[key] = False
        self._submit(Unregister(key, tuple(units)))

    def suspects_seen(self, key: AttemptKey) -> None:
        """The blocks that `unregister` named were hashed again, so their slots may be given away.

        Those of an attempt that is not of this registration always may; an answer that was to move is no source.
        """
        if self._suspects.pop(key, key not in self._live):
            self._submit(Release(key))

    def make_room(self, key: AttemptKey, asked: AskExtension) -> None:
        self._arrivals.make_room(key, asked)

    def decode(self, key: AttemptKey, verified: Verified, record: TransferRecord) -> None:
        key = self._arrivals.release(key)
        self._metrics.count_transfer(record, "verified")
        if (state := self._live.get(key)) is not None:
            self._report(state, stage_times(state, record), record)
            self._decode(Decode(key, verified, state.partial_blocks), state.reserved, self._cannot_copy)
            first, has_come = verified.first_token, state.came is not None
            for tokens in [self._arrivals.tokens(state, first)] if has_come else state.first_tokens(first):
                self._send(tokens)  # the engine's next turn is a step away
            state.first_token_sent = True
            log.info("received %d bytes over %s", sum(record.nbytes.values()), record.plane, extra=_of(state))

    def _cannot_copy(self, key: AttemptKey, fault: BaseException) -> None:
        self.fail(key, f"what was received cannot be copied to the device: {clipped(repr(fault))}")

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        key = self._arrivals.release(key)
        self._metrics.count_transfer(record, "failed")
        if failure.reason in reasons.WRONG:
            self._metrics.count_refused(record.purpose, failure.reason)
        self._submit(Release(key))
        if (state := self._live.pop(key, None)) is not None:  # the request stays: the router says what comes next
            log.warning("transfer failed: %s", failure.reason, extra=_of(state))
            self._send(TransferFailure(key.transfer_id, key.epoch, failure.reason, nameable(failure.units)))

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        key = self._arrivals.release(key)
        self._metrics.count_transfer(record, reason)
        self._submit(Release(key))
        self._forget(key)

    # --- housekeeping -----------------------------------------------------------------------------------------

    def look_at_deadlines(self) -> None:
        """Cancel what is overdue; give back soft blocks that no FETCH came for."""
        now = time.monotonic()
        for key, state in list(self._live.items()):
            if now >= state.deadline:
                self._send(RequestFailed(key.transfer_id, key.epoch, 504, "the request's deadline passed"))
                self.cancel(key, "deadline")
            elif state.lacks_room_for(NO_ROOM_S, now) and self._lacks_floor():
                self._feed_sender(key, ComputeFailed(reasons.NO_ROOM))
            elif self._arrivals.is_late(state, now):
                self._send(TransferFailure(key.transfer_id, key.epoch, "no room for the answer"))
                self.cancel(key, "no_room")
            elif state.is_unfetched and now - state.arrived_at > self._fetch_wait_s:
                state.soft_dropped = True
                self._submit(DropSoft(key))

    def _report(self, state: RequestState, times: StageTimes, record: TransferRecord | None = None) -> None:
        self._send(report_of(state, times, record))

    def _forget(self, key: AttemptKey) -> None:
        if self.sinks is not None:
            self.sinks.begun_without(key)
        if (state := self._live.pop(key, None)) is not None:
            self._arrivals.forget(state)
            self._drop_request(key.transfer_id)


def _of(state: RequestState) -> dict[str, str]:
    """Names a log line's request as the client and the other processes do."""
    return {"request_id": state.dispatch.request_id}
