"""One request at the router: its attempts, its token stream, its end. Pure: events in, actions out, time an argument.

The router owns attempts (protocol.md section 5). An *attempt* is one placement under one epoch: a prefill and a decode
worker, one worker alone, or the decode worker computing the prompt itself after a transfer failed. What may follow:

    transfer failed, or prefill failed (503)   another prefill worker, once per decode worker; then the prompt at decode
    server lost, or server failed (503)        both sides anew, elsewhere
    400, 500                                   the client's answer at once: no other worker would do better
    a second death in its own new step         500, for good: see `charges`

Before the first token `max_attempts` end in 503. After it an attempt goes on with what the client has (`going_on`), and
`max_continuations` placings anew, or no place, end in an error. A retry waits while a worker that was computing the
request may have died of it, and while the only worker for a charged request serves another charged one. Every side that
was sent work ends on its own or is sent CANCEL_REQUEST: the `sides` still open are exactly those.

Tokens are taken of the current epoch only, from the worker that emits them, at the next index of their answer. Smaller
indices are repeats and dropped; a gap is a fault. First tokens that end every answer come from the *prefill* worker.
They are held until its FINISHED, so that losing that worker between the two is still before the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from disagg.router.answers import AnswersSent, true_status
from disagg.router.attempt_events import (
    Action,
    Answered,
    ChoiceUnwanted,
    ClientGone,
    Emit,
    Event,
    Fail,
    OrderMessage,
    RouterClosing,
    SendOrder,
    TimePassed,
    TurnedAway,
    WentOn,
    WorkerLost,
)
from disagg.router.charges import Charges, NothingKnown, WorkerNews, incarnations
from disagg.router.choose import RETRY_BUSY_S, Placement, Unplaceable
from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.router.going_on import MAX_CONTINUATIONS, GoingOn
from disagg.router.next_place import NextPlace
from disagg.router.orders import Orders
from disagg.router.placer import Mint, Placer
from disagg.router.prefix_legs import PrefixLegs
from disagg.router.prompt_scores import ReportedScores
from disagg.router.record import AttemptRecord, RequestRecord
from disagg.router.workload import Share, shares_of
from disagg.transceiver.wire.messages.router import (
    YOUNG_TOKENS,
    CancelChoice,
    CancelRequest,
    Dispatch,
    Finished,
    PeerTarget,
    PrefillLocally,
    PromptScores,
    RequestFailed,
    Retarget,
    TransferFailure,
    TransferReport,
)
from disagg.transceiver.wire.messages.tokens import Tokens

PREFILL_LOST_GRACE_S = 1.0
"""How long the decode worker has to report the loss of its prefill worker itself, which it sees at the same time as
the router and with more knowledge (the KV may be verified already). 3 s to the loss + 1 s < the 5 s promised."""


class RoutedRequest:
    """All attempts of one request. `handle` is the only way in; `record` says what happened, for `/requests/{id}`."""

    def __init__(
        self,
        request: GenerationRequest,
        transfer_id: str,
        placer: Callable[[], Placer],
        mint: Mint,
        *,
        max_attempts: int,
        timeout_s: float,
        now: float,
        news: WorkerNews | None = None,
        legs: PrefixLegs | None = None,
        max_continuations: int = MAX_CONTINUATIONS,
    ) -> None:
        self.request = request
        self.transfer_id = transfer_id
        self.record = RequestRecord(request, transfer_id, now)
        self.deadline = now + timeout_s
        self.placement: Placement | None = None
        self.epoch = 0
        self.is_over = False
        self.sides: dict[str, int] = {}
        self._charges = Charges(transfer_id, news or NothingKnown())
        self._waiting: Callable[[float], None] | None = None
        self._orders = Orders(request, transfer_id, mint, now, self.deadline, legs)
        self._max_attempts = max_attempts
        self._going_on = GoingOn(max_continuations)
        self._num_before = 0
        self._has_spoken = False
        """Whether the current attempt gave the client a token."""
        self._held: list[Tokens | Finished] = []
        self._scores = ReportedScores(len(request.prompt), request.sampling.num_prompt_logprobs)
        self._early: list[Tokens | Finished] = []
        self._answers = AnswersSent(request)
        self._places = NextPlace(placer, request.sampling.max_tokens, self._answers, self._going_on)
        self._retargeted = False
        self._prefill_lost_at: float | None = None
        self._actions: list[Action] = []

    # --- what others may ask --------------------------------------------------------------------------------

    @property
    def load(self) -> tuple[Share, ...]:
        """What workers still have to do for it: the server, and the prefill worker until it emits a token."""
        if self.is_over or self.placement is None:
            return ()
        num_known = len(self.request.prompt) + self._num_before
        return shares_of(self.placement, num_known, self._answers.count, has_begun=self._has_spoken)

    @property
    def num_tokens(self) -> int:
        """Sent to the client, of all answers."""
        return self._answers.num_tokens

    @property
    def _here(self) -> Placement:
        """Where the current attempt is; there is one once the request has started."""
        assert self.placement is not None
        return self.placement

    @property
    def _is_served_alone(self) -> bool:
        return self._here.prefill is None

    @property
    def is_charged(self) -> bool:
        """Whether a worker may have died of this request. False once the request has shown that it was another."""
        return bool(self._charges.workers) and not self.is_over and self.num_tokens - self._num_before < YOUNG_TOKENS

    @property
    def is_waiting(self) -> bool:
        """Whether the next attempt waits to be made: this request is computed nowhere."""
        return self._waiting is not None

    def check_invariants(self) -> None:
        """Nothing is open after the end; before it the current server is; epochs are the attempts counted."""
        assert self.epoch == len(self.record.attempts)
        assert sum(not attempt.num_before for attempt in self.record.attempts) <= self._max_attempts
        assert self.record.num_continuations == self._going_on.count <= self._going_on.most
        assert not (self.is_over and self.sides)
        server = self.placement and self.placement.server.incarnation
        assert self.is_over or self._waiting or server in self.sides
        assert self._has_spoken == (self.num_tokens > self._num_before)
        self._answers.check_invariants()
        assert not self._actions

    # --- the way in -----------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Dispatch the first attempt, or fail where no worker can take it."""
        placed = self._places.first()
        if isinstance(placed, Unplaceable):
            self._fail(503, placed.reason, now, placed.retry_after_s)
        else:
            self._dispatch(placed, now)
        return self._take_actions()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event. After the end nothing happens any more, except that late reports are kept."""
        if isinstance(event, Answered) and isinstance(event.message, TransferReport):
            self.record.note(event.source, event.message)
        elif not self.is_over:
            self._react(event, now)
        return self._take_actions()

    def next_chunk(self, source: str, tokens: Tokens, now: float) -> TokenChunk | None:
        """What `handle` would emit for the next tokens of an attempt that has begun, for a fifth of its cost.

        None, with nothing done, where anything else follows or is wrong: then `handle` decides.
        """
        if self.is_over or self._waiting is not None or self.placement is None or now >= self.deadline:
            return None
        if tokens.epoch != self.epoch or source != self.placement.server.incarnation or not self._has_spoken:
            return None
        chunk = self._answers.next_chunk(tokens)
        self.record.num_tokens = self.num_tokens
        return chunk

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions + self._orders.of_legs(is_needed=not self.is_over and not self._has_spoken)

    def _react(self, event: Event, now: float) -> None:
        if isinstance(event, WorkerLost):
            self.sides.pop(event.incarnation, None)
        match event:
            case ClientGone():
                self._close("cancelled", now, "the client went away")
            case ChoiceUnwanted(choice):
                self._end_choice(choice, now)
            case TurnedAway(status, message):
                self._fail(status, message, now)
            case _ if now >= self.deadline:
                self._fail(504, "the request's deadline passed", now)
            case RouterClosing():
                self._fail(503, "the router is shutting down", now, RETRY_BUSY_S)
            case WorkerLost() if self._is_spent_by(event):
                self._fail(500, self._charges.refusal(), now)
            case _ if self._waiting is not None:
                self._go_on(now)
            case WorkerLost(incarnation, reason):
                self._lose(incarnation, reason, now)
            case Answered(source, message):
                if message.epoch == self.epoch:
                    self._hear(source, message, now)
            case TimePassed():
                self._check_prefill(now)

    def _hear(self, source: str, message: object, now: float) -> None:
        if isinstance(message, PromptScores):
            self._hear_scores(source, message, now)
        elif source == self._here.server.incarnation:
            self._hear_server(message, now)
        elif self._here.prefill is not None and source == self._here.prefill.incarnation:
            self._hear_prefill(message, now)

    def _hear_server(self, message: object, now: float) -> None:
        match message:
            case Tokens() | Finished() if not self._scores.is_complete and self._is_served_alone:
                self._fail(502, "fault of the worker: it answered without the prompt's log-probabilities", now)
            case Tokens() | Finished() if not self._scores.is_complete:
                self._early.append(message)  # two connections: it may overtake the prefill worker's word
            case Tokens():
                self._forward(message, now)
            case Finished():
                self._finish(message, now)
            case RequestFailed(status=503):
                self._server_failed(message.message, now)
            case RequestFailed():
                self._fail(true_status(message.status), message.message, now)
            case TransferFailure():
                self._transfer_failed(f"the transfer failed: {message.reason}", now)

    def _hear_prefill(self, message: object, now: float) -> None:
        """Before the server's first token only: with that token the server has all it needs from this worker."""
        if self._has_spoken:
            return
        match message:
            case Tokens() | Finished():
                self._held.append(message)
                self._finish_at_prefill(now)
            case RequestFailed(status=503) if self._early:
                self._scores_lost(message.message, now)
            case RequestFailed(status=503):
                self._transfer_failed(message.message, now)
            case RequestFailed():
                self._fail(true_status(message.status), message.message, now)

    def _hear_scores(self, source: str, message: PromptScores, now: float) -> None:
        """From the worker that computes the prompt. The first token waits for all of them."""
        if source != (self._here.prefill or self._here.server).incarnation or self.num_tokens:
            return None
        if fault := self._scores.add(message.scores):
            return self._fail(502, f"fault of the worker: {fault}", now)
        if self._scores.is_complete:
            early, self._early = self._early, []
            for word in early:
                if not self.is_over:
                    self._hear_server(word, now)
        return None

    def _scores_lost(self, reason: str, now: float) -> None:
        """The KV arrived, but the prompt's log-probabilities did not: nothing was sent yet, so all begins anew."""
        assert self._here.prefill is not None
        prefill = self._here.prefill.incarnation
        if self._waits_for((prefill,), lambda later: self._scores_lost(reason, later), now):
            return None
        self._places.failed_prefills.add(prefill)
        return self._give_up(reason, now) if self._is_spent else self._begin_anew(reason, now)

    # --- tokens ---------------------------------------------------------------------------------------------

    def _forward(self, message: Tokens, now: float) -> None:
        if fault := self._answers.fault_in(message):
            return self._fail(502, f"fault of the worker: {fault}", now)
        chunk = self._answers.add(message, lambda: self._scores.parts)
        if chunk is None:
            return None
        if not self._has_spoken:
            self._has_spoken = True
            self._going_on.note(self._here)
            self._actions += [WentOn(chunk.choice, self.record.current.is_exact)] if self._num_before else []
        self._actions.append(Emit(chunk))
        return self.record.emitted(self.num_tokens, now)

    def _finish(self, message: Finished, now: float) -> None:
        if fault := self._answers.fault_in_end(message):
            return self._fail(502, f"fault of the worker: {fault}", now)
        if (end := self._answers.finish(message)) is not None:
            self._actions.append(Emit(end))
        if not self._answers.is_over:
            return None
        self.sides.clear()  # the server is done, and could be so only after it had ACKed the prefill worker's KV
        return self._close("finished", now)

    def _end_choice(self, choice: int, now: float) -> None:
        """The client has enough of one answer: its worker need not go on with it."""
        is_new = self._answers.end(choice)
        if self._answers.is_over:
            self._close("cancelled", now, "the client went away")
        elif is_new and self._here.server.incarnation in self.sides:
            cancel = CancelChoice(self.transfer_id, self.epoch, choice)
            self._actions.append(SendOrder(self._here.server.incarnation, cancel))

    def _finish_at_prefill(self, now: float) -> None:
        """First tokens ended every answer. The prefill side is done; the server waits for KV that will not come."""
        if sum(isinstance(word, Finished) for word in self._held) < self._answers.count:
            return None
        if not self._scores.is_complete:
            return self._fail(502, "fault of the worker: it ended before the prompt's log-probabilities came", now)
        for word in sorted(self._held, key=lambda word: isinstance(word, Finished)):
            if isinstance(word, Tokens) and not self.is_over:
                self._forward(word, now)
            elif isinstance(word, Finished) and not self.is_over:
                self._cancel(self._here.server.incarnation, "finished")
                self._finish(word, now)
        return None

    # --- deaths and waiting ---------------------------------------------------------------------------------

    def _is_spent_by(self, event: WorkerLost) -> bool:
        """Charge the request with this death if it was new in that step, also under an earlier epoch."""
        epoch, attempts = event.in_step.get(self.transfer_id, 0), self.record.attempts
        if not 1 <= epoch <= len(attempts) or self.num_tokens - attempts[epoch - 1].num_before >= YOUNG_TOKENS:
            return False
        self._charges.workers.append(self.record.name_of(event.incarnation))
        self.record.charged_deaths = tuple(self._charges.workers)
        return self._charges.is_spent

    def _waits_for(self, parties: Iterable[str], retry: Callable[[float], None], now: float) -> bool:
        """Whether `retry` must wait; it is called again when something happened."""
        self._waiting = retry if self._charges.must_wait(parties, now) else None
        return self._waiting is not None

    def _go_on(self, now: float) -> None:
        retry, self._waiting = self._waiting, None
        assert retry is not None
        retry(now)

    # --- failures -------------------------------------------------------------------------------------------

    def _lose(self, incarnation: str, reason: str, now: float) -> None:
        if incarnation == self._here.server.incarnation:
            self._server_failed(f"worker `{self._here.server.worker_id}` was lost: {reason}", now)
        elif self._here.prefill is not None and incarnation == self._here.prefill.incarnation:
            self._prefill_lost_at = now

    def _check_prefill(self, now: float) -> None:
        """A lost prefill worker is the decode worker's to report; act for it when it does not."""
        lost_at = self._prefill_lost_at
        if lost_at is None or self._has_spoken or now - lost_at < PREFILL_LOST_GRACE_S:
            return
        if not self.record.current.has_report_of_server:
            self._transfer_failed("the prefill worker was lost", now)
        elif not self._scores.is_complete:
            self._scores_lost("the prefill worker was lost before all log-probabilities of the prompt came", now)

    def _server_failed(self, reason: str, now: float) -> None:
        if self.num_tokens:
            self._actions += map(Emit, self._answers.end_unheard())
            if self._answers.is_over:
                return self._close("finished", now)
        parties = () if self._has_spoken else incarnations(self._here)[1:]
        if self._waits_for(parties, lambda later: self._server_failed(reason, later), now):
            return None
        return self._leave_server(reason, now)

    def _leave_server(self, reason: str, now: float) -> None:
        self._places.failed_servers.add(self._here.server.incarnation)
        return self._give_up(reason, now) if self._is_spent else self._begin_anew(reason, now)

    @property
    def _is_spent(self) -> bool:
        """Whether the request may not be placed anew."""
        return self._going_on.is_spent if self.num_tokens else self.epoch >= self._max_attempts

    def _begin_anew(self, reason: str, now: float) -> None:
        """Both sides, elsewhere; later, when only a worker that another charged request has could take it."""
        taken = self._charges.taken
        placed = self._places.anew(taken)
        if taken and isinstance(placed, Unplaceable) and isinstance(self._places.anew(frozenset()), Placement):
            self._waiting = lambda later: self._begin_anew(reason, later)
            return None
        if isinstance(placed, Unplaceable):
            return self._give_up(f"{reason}; {placed.reason}", now, placed.retry_after_s)
        self.record.current.end(reason, now)
        self._cancel_all("retry")
        self._retargeted = False
        self._going_on.count += bool(self.num_tokens)
        return self._dispatch(placed, now)

    def _transfer_failed(self, reason: str, now: float) -> None:
        server, prefill = self._here.server, self._here.prefill
        if self._has_spoken or prefill is None:
            return self._fail(502, f"fault of the worker: {reason}", now)
        if self._waits_for((prefill.incarnation,), lambda later: self._transfer_failed(reason, later), now):
            return None
        self._places.failed_prefills.add(prefill.incarnation)
        if self._is_spent and not self.num_tokens:  # what one continuation tries is bounded by itself
            return self._give_up(reason, now)
        return self._compute_elsewhere(server, prefill, reason, now)

    def _compute_elsewhere(self, server: PeerTarget, prefill: PeerTarget, reason: str, now: float) -> None:
        """At another prefill worker, else at the decode worker; later, when another charged request is there."""
        taken = self._charges.taken
        if server.incarnation not in self.sides:  # lost while this waited
            return self._leave_server(f"worker `{server.worker_id}` was lost; {reason}", now)
        other = None if self._retargeted else self._places.other_prefill(server, taken)
        if server.incarnation in taken and other is None:
            self._waiting = lambda later: self._compute_elsewhere(server, prefill, reason, later)
            return None
        self.record.current.end(reason, now)
        self._cancel(prefill.incarnation, "retarget")
        self._retargeted = True
        return self._retarget(server, other, now) if other else self._prefill_locally(server, now)

    def _give_up(self, reason: str, now: float, retry_after_s: float = RETRY_BUSY_S) -> None:
        if self.num_tokens:
            return self._fail(502, f"{reason}{self._going_on.told}", now)
        attempts = f"{self.epoch} of {self._max_attempts} attempts used"
        return self._fail(503, f"{reason} ({attempts})", now, retry_after_s)

    # --- placing --------------------------------------------------------------------------------------------

    def _dispatch(self, placement: Placement, now: float) -> None:
        if placement.prefill is not None:
            to_server = self._begin_transfer("transfer", placement, now)
            return self._order(placement.server, to_server)
        self._begin(placement, "serve", now)
        return self._order(placement.server, self._orders.alone(self.epoch, placement, self._answers.output(), now))

    def _retarget(self, server: PeerTarget, prefill: PeerTarget, now: float) -> None:
        to_server = self._begin_transfer("retarget", Placement(server, prefill), now)
        self._order(server, Retarget(self.transfer_id, self.epoch, prefill, to_server.ticket))

    def _begin_transfer(self, mode: str, placement: Placement, now: float) -> Dispatch:
        """Dispatch the prefill side. Returns what the server is to be told."""
        assert placement.prefill is not None
        self._begin(placement, mode, now)
        to_prefill, to_server = self._orders.pair(self.epoch, placement, self._answers.output(), now)
        self._order(placement.prefill, to_prefill)
        return to_server

    def _prefill_locally(self, server: PeerTarget, now: float) -> None:
        self._begin(Placement(server), "local", now)
        self._order(server, PrefillLocally(self.transfer_id, self.epoch))

    def _begin(self, placement: Placement, mode: str, now: float) -> None:
        self.epoch += 1
        self.placement = placement
        self._prefill_lost_at = None
        self._held, self._early = [], []
        self._num_before, self._has_spoken = self.num_tokens, False
        if not self.num_tokens:
            self._scores.restart()
        is_exact = self._going_on.is_exact(placement)
        self.record.attempts.append(AttemptRecord(self.epoch, mode, placement, now, self._num_before, is_exact))

    # --- sides and the end ----------------------------------------------------------------------------------

    def _order(self, worker: PeerTarget, message: OrderMessage) -> None:
        self.sides[worker.incarnation] = self.epoch
        self._actions.append(SendOrder(worker.incarnation, message))

    def _cancel(self, incarnation: str, reason: str) -> None:
        epoch = self.sides.pop(incarnation, None)
        if epoch is not None:
            self._actions.append(SendOrder(incarnation, CancelRequest(self.transfer_id, epoch, reason)))

    def _cancel_all(self, reason: str) -> None:
        for incarnation in tuple(self.sides):
            self._cancel(incarnation, reason)

    def _fail(self, status: int, message: str, now: float, retry_after_s: float | None = None) -> None:
        self._actions.append(Fail(status, message, retry_after_s))
        self.record.status = status
        self._close("failed", now, message)

    def _close(self, state: str, now: float, error: str | None = None) -> None:
        self.is_over, self._waiting = True, None
        self._cancel_all(state)
        self.record.end(state, now, error)
