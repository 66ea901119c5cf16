"""One request at the router: its attempts, its token stream, its end. Pure: events in, actions out, time an argument.

The router owns attempts (protocol.md section 5). An *attempt* is one placement under one epoch: a prefill and a decode
worker, one worker alone, or the decode worker computing the prompt itself after a transfer failed. What may follow:

    transfer failed, or prefill failed (503)   another prefill worker, once per decode worker; then the prompt at decode
    server lost, or server failed (503)        both sides anew, elsewhere
    400, 500                                   the client's answer at once: no other worker would do better
    anything after the first token             an error: a retry could contradict tokens already sent
    a second death in its own new step         500, for good: see `charges`

When `max_attempts` are used the request ends with 503. A retry waits while a worker that was computing the request may
have died of it, and while the only worker for a charged request serves another charged one. Every side that was sent
work ends on its own or is sent CANCEL_REQUEST: the `sides` still open are exactly those.

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
    WorkerLost,
)
from disagg.router.charges import Charges, NothingKnown, WorkerNews, incarnations
from disagg.router.choose import RETRY_BUSY_S, Placement, Unplaceable
from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.router.orders import dispatch_of
from disagg.router.placer import Mint, Placer
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
        self._placer = placer
        self._mint = mint
        self._max_attempts = max_attempts
        self._held: list[Tokens | Finished] = []
        self._scores = ReportedScores(len(request.prompt), request.sampling.num_prompt_logprobs)
        self._early: list[Tokens | Finished] = []
        self._answers = AnswersSent(request)
        self._retargeted = False
        self._prefill_lost_at: float | None = None
        self._failed_prefills: set[str] = set()
        self._failed_servers: set[str] = set()
        self._actions: list[Action] = []

    # --- what others may ask --------------------------------------------------------------------------------

    @property
    def load(self) -> tuple[Share, ...]:
        """What workers still have to do for it: the server, and the prefill worker until the first token."""
        if self.is_over or self.placement is None:
            return ()
        return shares_of(self.placement, len(self.request.prompt), self._answers.count, has_begun=self.num_tokens > 0)

    @property
    def num_tokens(self) -> int:
        """Sent to the client, of all answers."""
        return self._answers.num_tokens

    @property
    def _is_served_alone(self) -> bool:
        return self.placement is not None and self.placement.prefill is None

    @property
    def is_charged(self) -> bool:
        """Whether a worker may have died of this request. False once the request has shown that it was another."""
        return bool(self._charges.workers) and not self.is_over and self.num_tokens < YOUNG_TOKENS

    @property
    def is_waiting(self) -> bool:
        """Whether the next attempt waits to be made: this request is computed nowhere."""
        return self._waiting is not None

    def check_invariants(self) -> None:
        """Nothing is open after the end; before it the current server is; epochs are the attempts counted."""
        assert self.epoch == len(self.record.attempts) <= self._max_attempts
        assert not (self.is_over and self.sides)
        server = self.placement and self.placement.server.incarnation
        assert self.is_over or self._waiting or server in self.sides
        self._answers.check_invariants()
        assert not self._actions

    # --- the way in -----------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Dispatch the first attempt, or fail where no worker can take it."""
        placed = self._placer().place(self.request.sampling.max_tokens)
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
        """What `handle` would emit for the next tokens of an answer that has begun, for a fifth of its cost.

        None, with nothing done, where anything else follows or is wrong: then `handle` decides.
        """
        if self.is_over or self._waiting is not None or self.placement is None or now >= self.deadline:
            return None
        if tokens.epoch != self.epoch or source != self.placement.server.incarnation:
            return None
        chunk = self._answers.next_chunk(tokens)
        self.record.num_tokens = self.num_tokens
        return chunk

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

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
        assert self.placement is not None
        if isinstance(message, PromptScores):
            self._hear_scores(source, message, now)
        elif source == self.placement.server.incarnation:
            self._hear_server(message, now)
        elif self.placement.prefill is not None and source == self.placement.prefill.incarnation:
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
        if self.num_tokens:
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
        assert self.placement is not None
        if source != (self.placement.prefill or self.placement.server).incarnation or self.num_tokens:
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
        assert self.placement is not None
        assert self.placement.prefill is not None
        prefill = self.placement.prefill.incarnation
        if self._waits_for((prefill,), lambda later: self._scores_lost(reason, later), now):
            return None
        self._failed_prefills.add(prefill)
        return self._give_up(reason, now) if self.epoch >= self._max_attempts else self._begin_anew(reason, now)

    # --- tokens ---------------------------------------------------------------------------------------------

    def _forward(self, message: Tokens, now: float) -> None:
        if fault := self._answers.fault_in(message):
            return self._fail(502, f"fault of the worker: {fault}", now)
        chunk = self._answers.add(message, lambda: self._scores.parts)
        if chunk is not None:
            self._actions.append(Emit(chunk))
            self.record.emitted(self.num_tokens, now)
        return None

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
        assert self.placement is not None
        is_new = self._answers.end(choice)
        if self._answers.is_over:
            self._close("cancelled", now, "the client went away")
        elif is_new:
            cancel = CancelChoice(self.transfer_id, self.epoch, choice)
            self._actions.append(SendOrder(self.placement.server.incarnation, cancel))

    def _finish_at_prefill(self, now: float) -> None:
        """First tokens ended every answer. The prefill side is done; the server waits for KV that will not come."""
        assert self.placement is not None
        if sum(isinstance(word, Finished) for word in self._held) < self._answers.count:
            return None
        if not self._scores.is_complete:
            return self._fail(502, "fault of the worker: it ended before the prompt's log-probabilities came", now)
        for word in sorted(self._held, key=lambda word: isinstance(word, Finished)):
            if isinstance(word, Tokens) and not self.is_over:
                self._forward(word, now)
            elif isinstance(word, Finished) and not self.is_over:
                self._cancel(self.placement.server.incarnation, "finished")
                self._finish(word, now)
        return None

    # --- deaths and waiting ---------------------------------------------------------------------------------

    def _is_spent_by(self, event: WorkerLost) -> bool:
        """Charge the request with this death if it was new in that step, also under an earlier epoch."""
        if event.in_step.get(self.transfer_id, 0) < 1 or self.num_tokens >= YOUNG_TOKENS:
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
        assert self.placement is not None
        if incarnation == self.placement.server.incarnation:
            self._server_failed(f"worker `{self.placement.server.worker_id}` was lost: {reason}", now)
        elif self.placement.prefill is not None and incarnation == self.placement.prefill.incarnation:
            self._prefill_lost_at = now

    def _check_prefill(self, now: float) -> None:
        """A lost prefill worker is the decode worker's to report; act for it when it does not."""
        lost_at = self._prefill_lost_at
        if lost_at is None or self.num_tokens or now - lost_at < PREFILL_LOST_GRACE_S:
            return
        if not self.record.current.has_report_of_server:
            self._transfer_failed("the prefill worker was lost", now)
        elif not self._scores.is_complete:
            self._scores_lost("the prefill worker was lost before all log-probabilities of the prompt came", now)

    def _server_failed(self, reason: str, now: float) -> None:
        assert self.placement is not None
        if self.num_tokens:
            return self._fail(502, reason, now)
        parties = incarnations(self.placement)[1:]
        if self._waits_for(parties, lambda later: self._server_failed(reason, later), now):
            return None
        return self._leave_server(reason, now)

    def _leave_server(self, reason: str, now: float) -> None:
        assert self.placement is not None
        self._failed_servers.add(self.placement.server.incarnation)
        if self.epoch >= self._max_attempts:
            return self._give_up(reason, now)
        return self._begin_anew(reason, now)

    def _begin_anew(self, reason: str, now: float) -> None:
        """Both sides, elsewhere; later, when only a worker that another charged request has could take it."""
        taken = self._charges.taken
        placed = self._place_anew(taken)
        if taken and isinstance(placed, Unplaceable) and isinstance(self._place_anew(frozenset()), Placement):
            self._waiting = lambda later: self._begin_anew(reason, later)
            return None
        if isinstance(placed, Unplaceable):
            return self._give_up(f"{reason}; {placed.reason}", now, placed.retry_after_s)
        self.record.current.end(reason, now)
        self._cancel_all("retry")
        self._retargeted = False
        return self._dispatch(placed, now)

    def _place_anew(self, taken: frozenset[str]) -> Placement | Unplaceable:
        """Where nothing failed yet; else also where a transfer failed, which may have been the server's fault."""
        placer, max_tokens = self._placer(), self.request.sampling.max_tokens
        placed = placer.place(max_tokens, frozenset(self._failed_servers | self._failed_prefills | taken))
        if isinstance(placed, Unplaceable):
            placed = placer.place(max_tokens, frozenset(self._failed_servers | taken))
        return placed

    def _transfer_failed(self, reason: str, now: float) -> None:
        assert self.placement is not None
        server, prefill = self.placement.server, self.placement.prefill
        if self.num_tokens or prefill is None:
            return self._fail(502, f"fault of the worker: {reason}", now)
        parties = (prefill.incarnation,)
        if self._waits_for(parties, lambda later: self._transfer_failed(reason, later), now):
            return None
        self._failed_prefills.add(prefill.incarnation)
        if self.epoch >= self._max_attempts:
            return self._give_up(reason, now)
        return self._compute_elsewhere(server, prefill, reason, now)

    def _compute_elsewhere(self, server: PeerTarget, prefill: PeerTarget, reason: str, now: float) -> None:
        """At another prefill worker, else at the decode worker; later, when another charged request is there."""
        taken = self._charges.taken
        if server.incarnation not in self.sides:  # lost while this waited
            return self._leave_server(f"worker `{server.worker_id}` was lost; {reason}", now)
        other = None if self._retargeted else self._other_prefill(server, taken)
        if server.incarnation in taken and other is None:
            self._waiting = lambda later: self._compute_elsewhere(server, prefill, reason, later)
            return None
        self.record.current.end(reason, now)
        self._cancel(prefill.incarnation, "retarget")
        self._retargeted = True
        return self._retarget(server, other, now) if other else self._prefill_locally(server, now)

    def _other_prefill(self, server: PeerTarget, taken: frozenset[str]) -> PeerTarget | None:
        return self._placer().prefill_for(server.incarnation, frozenset(self._failed_prefills | taken))

    def _give_up(self, reason: str, now: float, retry_after_s: float = RETRY_BUSY_S) -> None:
        attempts = f"{self.epoch} of {self._max_attempts} attempts used"
        self._fail(503, f"{reason} ({attempts})", now, retry_after_s)

    # --- placing --------------------------------------------------------------------------------------------

    def _dispatch(self, placement: Placement, now: float) -> None:
        server, prefill = placement.server, placement.prefill
        if prefill is None:
            self._begin(placement, "serve", now)
            return self._order(server, self._dispatch_to("serve", now))
        self._begin(placement, "transfer", now)
        ticket = self._ticket(placement, now)
        self._order(prefill, self._dispatch_to("prefill", now, server, ticket))
        return self._order(server, self._dispatch_to("decode", now, prefill, ticket))

    def _retarget(self, server: PeerTarget, prefill: PeerTarget, now: float) -> None:
        placement = Placement(server, prefill)
        self._begin(placement, "retarget", now)
        ticket = self._ticket(placement, now)
        self._order(prefill, self._dispatch_to("prefill", now, server, ticket))
        self._order(server, Retarget(self.transfer_id, self.epoch, prefill, ticket))

    def _prefill_locally(self, server: PeerTarget, now: float) -> None:
        self._begin(Placement(server), "local", now)
        self._order(server, PrefillLocally(self.transfer_id, self.epoch))

    def _begin(self, placement: Placement, mode: str, now: float) -> None:
        self.epoch += 1
        self.placement = placement
        self._prefill_lost_at = None
        self._held, self._early = [], []
        self._scores.restart()
        self.record.attempts.append(AttemptRecord(self.epoch, mode, placement, now))

    def _ticket(self, placement: Placement, now: float) -> bytes:
        assert placement.prefill is not None
        ttl_s = self._remaining_s(now)
        return self._mint(self.epoch, placement.prefill.incarnation, placement.server.incarnation, ttl_s)

    def _dispatch_to(self, mode: str, now: float, peer: PeerTarget | None = None, ticket: bytes = b"") -> Dispatch:
        remaining_s = self._remaining_s(now)  # the ticket's ttl_s too: the prefill worker checks it with this value
        return dispatch_of(self.request, self.transfer_id, self.epoch, mode, remaining_s, peer, ticket)

    def _remaining_s(self, now: float) -> float:
        return max(self.deadline - now, 0.0)

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
