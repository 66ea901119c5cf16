"""A request whose answer may be moved from the worker that decodes it to another. Pure, as all of a request is.

The source decodes under epoch e, the sink gets e+1. The router alone says which of them speaks:

    before the first token of e+1    tokens of e are forwarded; the source may finish the answer
    a token of e+1                   the sink has the answer: what comes of e later is dropped, the source is cancelled
    either end fails, or time ends   e+1 is closed for ever and its worker cancelled; the source is told RESUME(e+2)
    the source is lost               the sink has it already, or says that it failed: then as after any death
    the sink is lost                 RESUME(e+2)

A source that stands still goes on at RESUME alone, so no two workers ever speak. What a source said under earlier
epochs of its own is forwarded too: its words are in order. Repeats are dropped by index. Moves and RESUMEs raise the
epoch and count in no limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import Action, Answered, Event, MoveEnded, SendOrder, TimePassed, WorkerLost
from disagg.router.choose import Placement
from disagg.router.placer import MintLeg
from disagg.router.record import AttemptRecord
from disagg.router.workload import Share
from disagg.transceiver.wire.messages.router import (
    Finished,
    PeerTarget,
    RequestFailed,
    Resume,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.timing import LEASE_S

MOVE_S: Final = LEASE_S
"""How long a move may take. Both ends say that they failed long before; an end that says nothing has hung, and a source
that stands still must not wait for it longer than any source waits for a sink."""

SINK_GRACE_S: Final = 1.0
"""How long a sink has to speak when its source was lost: it may have the answer, whose token is on its way."""

MOVE_EVERY_S: Final = 10.0
"""A request moves no more often, unless its worker drains: each move is a pause, and two full workers would throw
answers to and fro."""

MOVE_RETRY_S: Final = 1.0
"""A move that failed is tried again after this, elsewhere if there is another worker: room comes as answers end."""


@dataclass(slots=True)
class Move:
    """The one that is under way. `epoch`: the sink's."""

    source: PeerTarget
    sink: PeerTarget
    epoch: int
    until: float
    source_lost: str = ""
    """Why, once it is."""


class MovableRequest(RoutedRequest):
    """As `RoutedRequest`; `move` takes its answer elsewhere, `leave` what has no answer yet."""

    def __init__(self, *args: Any, mint_leg: MintLeg, **options: Any) -> None:
        super().__init__(*args, **options)
        self._mint_leg = mint_leg
        self._moving: Move | None = None
        self._own_epochs: frozenset[int] = frozenset()
        """Earlier ones under which the current server spoke, or speaks until it hears of the next."""
        self._moves_again_at = self._tries_again_at = float("-inf")
        self.avoided_sink = ""
        """Where the last move failed."""

    # --- what others may ask --------------------------------------------------------------------------------

    @property
    def load(self) -> tuple[Share, ...]:
        sink = () if self._moving is None or self.is_over else (Share(self._moving.sink.incarnation, num_answers=1),)
        return (*super().load, *sink)

    @property
    def is_moving(self) -> bool:
        return self._moving is not None

    @property
    def server(self) -> str:
        """The incarnation that gives the answer, or is to give it; "" before the first placement."""
        return self.placement.server.incarnation if self.placement is not None else ""

    def may_move(self, now: float, *, is_pressing: bool) -> bool:
        """Whether there is one answer, begun and not about to end, that may be moved now.

        `is_pressing`: its worker drains. Then the last move may be a moment ago.
        """
        if self.is_over or self.is_waiting or self._moving is not None or not self._has_spoken:
            return False
        is_long = self._answers.count == 1 and self._answers.most_left > 1
        return is_long and now >= (self._tries_again_at if is_pressing else self._moves_again_at)

    def check_invariants(self) -> None:
        if self._moving is not None:
            assert self._moving.epoch == self.epoch not in self._own_epochs
            assert not self.is_over
            assert self._moving.sink.incarnation in self.sides
        if self._moving is None or not self._moving.source_lost:
            super().check_invariants()

    # --- the way in -----------------------------------------------------------------------------------------

    def move(self, sink: PeerTarget, leg: str, now: float) -> list[Action]:
        """Let `sink` take the answer over, by the transfer `leg`. Ask `may_move` first."""
        source = self._here.server
        self._own_epochs |= {self.epoch}
        self.epoch += 1
        self._moving = Move(source, sink, self.epoch, now + MOVE_S)
        self._append(AttemptRecord(self.epoch, "move", Placement(sink, source), now, self.num_tokens))
        ends, output = (source, sink), self._answers.output()
        grant, dispatch = self._orders.move(self.epoch, leg, ends, output, self._mint_leg, now)
        self._actions.append(SendOrder(source.incarnation, grant))
        self._order(sink, dispatch)
        return self._take_actions()

    def leave(self, now: float) -> list[Action]:
        """Begin anew elsewhere, where nothing was said yet and there is another place: its worker drains."""
        if self.is_over or self.is_waiting or self.num_tokens or self.record.current.has_report_of_server:
            return []
        placed = self._places.anew(frozenset({self.server}))
        if self._is_spent or not isinstance(placed, Placement):
            return []
        self.record.current.end("its worker drains", now)
        self._cancel_all("draining")
        self._retargeted = False
        self._dispatch(placed, now)
        return self._take_actions()

    def _react(self, event: Event, now: float) -> None:
        if now >= self.deadline or self.is_waiting or not self._react_to_move(event, now):
            super()._react(event, now)

    def _react_to_move(self, event: Event, now: float) -> bool:
        """Whether the event was one of a move."""
        move = self._moving
        match event:
            case Answered(source, message) if move is not None and source == move.sink.incarnation:
                if message.epoch == move.epoch:
                    self._hear_sink(message, now)
            case Answered(source, message) if source == self.server and message.epoch in self._own_epochs:
                self._hear_source(source, message, now)
            case WorkerLost(incarnation, reason) if move is not None and incarnation == move.sink.incarnation:
                self.sides.pop(incarnation, None)
                self._end_move(f"worker `{move.sink.worker_id}` was lost: {reason}", now)
            case WorkerLost(incarnation, reason) if move is not None and incarnation == move.source.incarnation:
                self.sides.pop(incarnation, None)
                move.source_lost, move.until = reason, now + SINK_GRACE_S
            case TimePassed() if move is not None and now >= move.until:
                self._end_move("the move took too long", now)
            case _:
                return False
        return True

    # --- which of them speaks -----------------------------------------------------------------------------------------

    def _hear_sink(self, message: object, now: float) -> None:
        match message:
            case Tokens():
                self._take_over(now)
                self._forward(message, now)
            case TransferFailure(reason=reason) | RequestFailed(message=reason):
                self._end_move(reason, now)
            case Finished():
                self._end_move("fault of the worker: it finished an answer without a token", now)

    def _hear_source(self, source: str, message: object, now: float) -> None:
        """Of an epoch before the current one, which is this server's own all the same."""
        match message:
            case TransferFailure(reason=reason):  # the second end that says so tells nothing new
                if self._moving is not None:
                    self._end_move(reason, now)
            case Finished() | RequestFailed():  # it has the answer, then, and no other worker has
                self._drop_move("finished" if isinstance(message, Finished) else "failed")
                self._hear(source, message, now)
            case _:
                self._hear(source, message, now)

    def _take_over(self, now: float) -> None:
        """The sink has spoken, and so it has the answer."""
        move, self._moving = self._moving, None
        assert move is not None
        self._cancel(move.source.incarnation, "moved")
        self.placement, self._own_epochs = Placement(move.sink), frozenset()
        self._moves_again_at, self._tries_again_at = now + MOVE_EVERY_S, now
        self.avoided_sink = ""
        self.record.current.has_moved = True
        self._end_earlier("moved", now)
        self._actions.append(MoveEnded("moved"))

    def _end_move(self, reason: str, now: float) -> None:
        """The sink's epoch is closed: whatever it says from here on is dropped. Only then the source is told."""
        move = self._moving
        assert move is not None
        self._drop_move("failed")
        self.record.current.end(reason, now)
        self._moves_again_at = self._tries_again_at = now + MOVE_RETRY_S
        self.avoided_sink = move.sink.incarnation
        if move.source_lost:
            return self._server_failed(f"worker `{move.source.worker_id}` was lost: {move.source_lost}", now)
        self._end_earlier("resumed", now)
        self.epoch += 1
        self._append(AttemptRecord(self.epoch, "resume", Placement(move.source), now, self.num_tokens))
        return self._order(move.source, Resume(self.transfer_id, self.epoch))

    def _drop_move(self, outcome: str) -> None:
        move, self._moving = self._moving, None
        if move is not None:
            self._cancel(move.sink.incarnation, outcome)
            self._actions.append(MoveEnded(outcome))

    # --- as before, with a move --------------------------------------------------------------------------------

    def _append(self, record: AttemptRecord) -> None:
        record.is_exact = self._going_on.is_exact(record.placement)
        self.record.attempts.append(record)

    def _end_earlier(self, outcome: str, now: float) -> None:
        for attempt in self.record.attempts[:-1]:
            attempt.end(outcome, now)

    def _begin(self, placement: Placement, mode: str, now: float) -> None:
        self._own_epochs = frozenset()
        super()._begin(placement, mode, now)

    def _close(self, state: str, now: float, error: str | None = None) -> None:
        self._drop_move(state)
        super()._close(state, now, error)
