"""The attempts dispatched to this worker: routes the router's messages to engine and transfers, and answers back.

    router message -> take_message -> engine command, transfer event
    engine event   -> take_event   -> transfer event, message to the router
    transfer action -> the host methods (pin, release_source, decode, ...) -> engine command, message to the router

Synchronous throughout: nothing here waits, and every path of an attempt ends in a `Release` or in the engine's own end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
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
    Pin,
    PinnedEvent,
    Prefill,
    PrefixEvictedEvent,
    PrefixRoomEvent,
    PrefixWantedEvent,
    PromptComputedEvent,
    PromptScoredEvent,
    Release,
    Reserve,
    ReservedEvent,
    Serve,
    SoftDroppedEvent,
    TokensEvent,
    Unregister,
)
from disagg.transceiver.peers.decode_side import ReceivingSide, TransferRecord
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.protocol.actions import ReportFailed, Verified
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
    Retarget,
    RouterMessage,
    TransferFailure,
    TransferReport,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import FirstToken, Geometry, StageTimes, UnitName, nameable
from disagg.worker.metrics import WorkerMetrics
from disagg.worker.pairing import Pairing
from disagg.worker.prefix_sinks import PrefixSinks
from disagg.worker.prefix_sources import PrefixSources
from disagg.worker.request_state import RequestState, transfer_times
from disagg.worker.taking_in import OnFault, Slots

log = logging.getLogger(__name__)

NO_ROOM_S: Final = 1.0
"""Long against a step and a transfer, which may give room at any moment, short against a client's patience."""


class Attempts:
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
        lacks_floor: Callable[[], bool] = lambda: False,
    ) -> None:
        """`decode`: takes a `Decode` with the slots whose KV landed; without it they are there already. `lacks_floor`:
        whether reservations are held here in pools that keep no room for what others fetch.
        """
        self._lacks_floor = lacks_floor
        self._decode = decode or (lambda command, slots, on_fault: submit(command))
        self._submit, self._send, self._pair, self._metrics = submit, send, pair, metrics
        self._fetch_wait_s = fetch_wait_s
        self._live: dict[AttemptKey, RequestState] = {}
        self._requests: dict[str, Dispatch] = {}
        self._peers: dict[str, PeerTarget] = {}
        self._suspects: dict[AttemptKey, bool] = {}
        """Attempts whose sources are hashed again first: True once the transfer needs them no more."""
        self.sending: SendingSide | None = None
        self.receiving: ReceivingSide | None = None
        self.sources: PrefixSources | None = None
        self.sinks: PrefixSinks | None = None

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._live

    def peer_geometry(self, key: AttemptKey) -> Geometry:
        """How the peer of a live attempt's transfer lays out its cache."""
        return self._live[key].pairing.peer_geometry

    def num_known(self, key: AttemptKey) -> int | None:
        """Tokens that a live attempt's transfer covers; None for another transfer."""
        state = self._live.get(key)
        return state.dispatch.num_known if state is not None else None

    @property
    def keys(self) -> tuple[AttemptKey, ...]:
        return tuple(self._live)

    @property
    def held(self) -> tuple[AttemptKey, ...]:
        """Attempts of which the engine may hold blocks, with those that are over but have blocks to be hashed again."""
        return tuple({*self._live, *self._suspects})

    @property
    def num_open(self) -> int:
        """Requests that this worker has a part in still, those included whose next attempt the router decides on."""
        held = self.receiving.held if self.receiving is not None else ()
        return len({*self._requests, *(key.transfer_id for key in held)})

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
            case Grant():
                if self.sources is not None:
                    self.sources.grant(message)
            case CancelChoice():
                self._cancel_choice(AttemptKey(message.transfer_id, message.epoch, message.choice))
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
        state = RequestState(dispatch, self._pair(dispatch))
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
        boundary = self.sinks.expect(state) if self.sinks is not None and dispatch.mode != "decode" else 0
        if dispatch.mode == "serve":
            state.to_follow.extend(serves_of(dispatch, urgent=urgent))
            self._submit(replace(state.to_follow.popleft(), prefix_boundary=boundary))
        elif dispatch.mode == "decode":
            self._submit(Reserve(key, dispatch.prompt, sampling, state.pairing.precision, priority, output))
            self._reach(dispatch.peer)
        elif self.sending is not None and dispatch.peer is not None:
            # First: a FETCH that came early pins it at once.
            self._submit(Prefill(key, dispatch.prompt, sampling, priority, output, boundary))
            self.sending.start(key, state.pairing.sender())

    def _reach(self, peer: PeerTarget | None) -> None:
        """A peer that no request has named before is connected while the prompt waits for room."""
        if self.receiving is not None and peer is not None:
            self.receiving.reach(peer)

    def _was_here(self, key: AttemptKey) -> bool:
        """Its transfer may still be stopping, long after the attempt was cancelled."""
        sides = (self.sending, self.receiving)
        return any(side is not None and side.knows(key) for side in sides)

    def _is_misplaced(self, state: RequestState) -> bool:
        mode = state.dispatch.mode
        side = {"serve": True, "prefill": self.sending, "decode": self.receiving}.get(mode)
        return side is None or not (mode == "serve" or state.pairing.fits)

    def _again(self, transfer_id: str, epoch: int, **change: object) -> None:
        """The next attempt of a request whose last one failed here. The old sequence is gone; a new one is built."""
        last = self._requests.get(transfer_id)
        if last is None:
            self._send(RequestFailed(transfer_id, epoch, 503, "this worker no longer has the request"))
            return
        self._dispatch(replace(last, epoch=epoch, **change), urgent=True)  # type: ignore[arg-type]  # fields of Dispatch, by name

    def cancel(self, key: AttemptKey, reason: str) -> None:
        """End an attempt wherever it stands; what a transfer still holds goes when its core says so."""
        if self.sending is not None and key in self.sending:
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
                self._send(Finished(key.transfer_id, key.epoch, index, reason, stop_token_id, key.choice))
                self._end_choice(state, key)
            case FailedEvent(key=key, status=status, message=message):
                if state.dispatch.sampling.num_choices > 1:
                    self._submit(Release(key.attempt))  # the others of its answers end with it
                self._fail(key.attempt, status, message)
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
        self._send_first_token(state, first)
        for choice in range(1 + len(first.others)):
            index = state.begins_at(choice) + 1
            self._send(Finished(key.transfer_id, key.epoch, index, "stop", first.of(choice).token_id, choice))
        self._feed_sender(key, FinishedEarly(event.compute_id))

    def _send_first_token(self, state: RequestState, first: FirstToken) -> None:
        """Of every answer to the prompt."""
        key = state.key
        for choice in range(1 + len(first.others)):
            token, index = first.of(choice), state.begins_at(choice)
            logprobs = () if token.logprobs is None else (token.logprobs,)
            num_cached_tokens = 0 if index else first.num_cached_tokens
            ids = (token.token_id,)
            self._send(Tokens(key.transfer_id, key.epoch, index, ids, logprobs, num_cached_tokens, choice))

    def _fail(self, key: AttemptKey, status: int, message: str) -> None:
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
        if (state := self._live.get(key)) is not None:
            state.is_pinned, state.pinned_at = True, time.monotonic()
            self._submit(Pin(key))

    def release_source(self, key: AttemptKey, reason: str) -> None:
        log.debug("source released: %s", reason)
        if key in self._suspects:
            self._suspects[key] = True
        else:
            self._submit(Release(key))
        self._forget(key)

    def unregister(self, key: AttemptKey, units: Sequence[UnitName]) -> None:
        log.error("the peer's digests disagree for %d blocks of %s: %s", len(units), key.transfer_id, list(units)[:8])
        self._metrics.count_digest_failure(len(units))
        self._suspects[key] = False
        self._submit(Unregister(key, tuple(units)))

    def suspects_seen(self, key: AttemptKey) -> None:
        """The blocks that `unregister` named were hashed again, so their slots may be given away.

        Those of an attempt that is not of this registration always may.
        """
        if self._suspects.pop(key, True):
            self._submit(Release(key))

    def decode(self, key: AttemptKey, verified: Verified, record: TransferRecord) -> None:
        self._count(record, "verified")
        if (state := self._live.get(key)) is not None:
            self._report(state, transfer_times(state, record), record)
            self._decode(Decode(key, verified, state.partial_blocks), state.reserved, self._cannot_copy)
            self._send_first_token(state, verified.first_token)  # the engine's next turn is a step away
            state.first_token_sent = True
            log.info("received %d bytes over %s", sum(record.nbytes.values()), record.plane, extra=_of(state))

    def _cannot_copy(self, key: AttemptKey, fault: BaseException) -> None:
        self.fail(key, f"what was received cannot be copied to the device: {clipped(repr(fault))}")

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        self._count(record, "failed")
        if failure.reason in reasons.WRONG:
            self._metrics.count_refused(record.purpose, failure.reason)
        self._submit(Release(key))
        if (state := self._live.pop(key, None)) is not None:  # the request stays: the router says what comes next
            log.warning("transfer failed: %s", failure.reason, extra=_of(state))
            self._send(TransferFailure(key.transfer_id, key.epoch, failure.reason, nameable(failure.units)))

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        self._count(record, reason)
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
            elif self._may_wait_in_a_circle(state, now):
                self._feed_sender(key, ComputeFailed(reasons.NO_ROOM))
            elif self._waits_too_long(state, now):
                state.soft_dropped = True
                self._submit(DropSoft(key))

    def _may_wait_in_a_circle(self, state: RequestState, now: float) -> bool:
        """A fetched prompt without room, where room is kept for what others compute and there is no floor: its sink may
        be waited for here, so one of both must let go.
        """
        waits_since = state.pinned_at if state.dispatch.mode == "prefill" and not state.has_room else None
        return waits_since is not None and now - waits_since > NO_ROOM_S and self._lacks_floor()

    def _waits_too_long(self, state: RequestState, now: float) -> bool:
        unfetched = state.dispatch.mode == "prefill" and not state.is_pinned and not state.soft_dropped
        return unfetched and now - state.arrived_at > self._fetch_wait_s

    def _count(self, record: TransferRecord, outcome: str) -> None:
        self._metrics.count_transfer(record, outcome)

    def _report(self, state: RequestState, times: StageTimes, record: TransferRecord | None = None) -> None:
        """This worker's part of the attempt, for `/requests/{id}`; `record` where KV landed here."""
        key = state.key
        report = TransferReport(key.transfer_id, key.epoch, state.pairing.worker_id, "", (), times)
        if record is not None:
            groups = state.pairing.group_bytes(record)
            report = replace(report, plane=record.plane, groups=groups, num_operations=record.num_operations)
        self._send(report)

    def _forget(self, key: AttemptKey) -> None:
        if self.sinks is not None:
            self.sinks.begun_without(key)
        if self._live.pop(key, None) is not None:
            self._drop_request(key.transfer_id)

    def _drop_request(self, transfer_id: str) -> None:
        if not any(key.transfer_id == transfer_id for key in self._live):
            self._requests.pop(transfer_id, None)


def serves_of(dispatch: Dispatch, *, urgent: bool) -> Iterator[Serve]:
    """The attempt as one command, or where several answers go on, one for each."""
    key, sampling = AttemptKey(dispatch.transfer_id, dispatch.epoch), dispatch.sampling
    if not dispatch.output:
        yield Serve(key, dispatch.prompt, sampling, urgent, dispatch.priority)
    for answer in dispatch.output:
        alone = replace(sampling.of_choice(answer.choice), num_choices=1)
        own = replace(key, choice=answer.choice)
        yield Serve(own, dispatch.prompt, alone, True, dispatch.priority, answer.token_ids)


def _of(state: RequestState) -> dict[str, str]:
    """Names a log line's request as the client and the other processes do."""
    return {"request_id": state.dispatch.request_id}
