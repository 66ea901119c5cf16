"""The sink of a move: it makes room for an answer that another worker decodes, hears how far that has come, lands it.

The verdict is the same one as of every transfer: `Verified`, and the answer goes on here, or a failure. What was
reserved before the answer stood still may not suffice for what it has become: then the move ends, and the answer stays
where it is. States and legal steps are in `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from disagg.transceiver.layout.required import required_units
from disagg.transceiver.protocol.actions import AskExtension, ReportFailed, Verified
from disagg.transceiver.protocol.events import CancelAsked, Extended, PeerGone, RoomMade, RoomRefused, Tick
from disagg.transceiver.protocol.inbox import Inbox
from disagg.transceiver.protocol.manifest import is_sealed
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.state import Decision, Kind, Role, State
from disagg.transceiver.protocol.transfer import Ends, Reactions
from disagg.transceiver.wire import reasons, ticket
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages.peer import (
    Accepted,
    Ack,
    Cancelled,
    Closed,
    Done,
    Failed,
    Fetch,
    Received,
    Refused,
    num_runs,
)
from disagg.transceiver.wire.messages.ranges import MAX_RUNS
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import MOVE


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """What the router ordered: `prompt` and `output` are the request's, the latter as far as the router has it."""

    order: Order
    request: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]


class MoveSink(Receiver):
    role: ClassVar[Role] = Role.MOVE_SINK
    purpose: ClassVar[str] = MOVE

    def __init__(self, ends: Ends, move: MoveOrder, now: float) -> None:
        super().__init__(ends, move.order, now)
        self._move = move
        self._held: list[tuple[int, ...]] = []
        self._output = move.output

    @property
    def _boundary(self) -> int:
        return len(self._move.prompt) + len(self._output) - 1

    @property
    def _required(self) -> tuple[GroupRuns, ...]:
        geometry = self._order.geometry
        return required_units(geometry.groups, self._boundary, geometry.block_size, self._held)

    def _check(self, subject: Any) -> None:
        match subject:
            case RoomMade(held) if num_runs(held) > MAX_RUNS:
                raise LocalProtocolError(f"{num_runs(held)} runs are held, one FETCH names at most {MAX_RUNS}")
            case Extended(required) if self.state is State.EXTENDING and _runs(required) != _runs(self._required):
                raise LocalProtocolError("there is room for other blocks than those that are to come")
            case Extended() | RoomMade():
                pass
            case _:
                super()._check(subject)

    # --- asking ---------------------------------------------------------------------------------------------

    def _ask_for_answer(self, event: RoomMade) -> None:
        self._held = [()] * len(self._order.geometry.groups)
        for entry in event.held:
            self._held[entry.group] = entry.ordinals
        held = tuple(entry for entry in event.held if entry.runs)
        fetch = Fetch(self._header(), self._order.ticket, self._boundary, (), self._order.plane, MOVE, held=held)
        self._insist(fetch)

    def _hear_how_far(self, message: Accepted) -> None:
        """The answer stands still. What it has become must follow from what the router has of it."""
        self._repeat.stop()
        output = (*self._move.output, *message.output)
        is_whole = message.boundary == len(self._move.prompt) + len(output) - 1
        if not is_whole or len(message.logprobs) not in (0, len(message.output)) or message.precision:
            self._fault(reasons.PROTOCOL)
            return
        self._output = output
        self._do(AskExtension(output, message.logprobs))

    def _take_room(self, event: Extended) -> None:
        self._inbox = Inbox((entry.group, ordinal) for entry in event.required for ordinal in entry.ordinals)
        self._poll.start(self._now)
        self._send(Received(self._header(), self._inbox.highest))

    def _give_room_up(self, event: RoomRefused) -> None:
        self._stop(event.reason, ReportFailed(event.reason))

    # --- the verdict ----------------------------------------------------------------------------------------

    def _is_sealed(self, done: Done) -> bool:
        tip = ticket.prompt_hash((*self._move.prompt, *self._output))
        return (done.purpose, done.boundary) == (MOVE, self._boundary) and is_sealed(
            self._order.keys.manifest_mac, done, tip
        )

    def _give_licence(self, done: Done) -> None:
        self._insist(Ack(self._header()))
        self._give_up_later()
        assert done.first_token is not None, "a source of one rank sends the newest token"
        self._do(Verified(self._move.request, self.ends.epoch, done.first_token))

    # --- what to do on each step ----------------------------------------------------------------------------

    _open: ClassVar[dict[Kind, Callable[[Any, Any], object]]] = {
        Failed: Receiver._failed,
        Cancelled: Receiver._cancelled,
        Refused: Receiver._refused,
        CancelAsked: Receiver._cancel,
        Decision.OVERDUE: Receiver._fail_late,
        Closed: Receiver._join_unknown,
        PeerGone: Receiver._join_lost,
        Tick: Receiver._look_at_limit,
    }

    reactions: ClassVar[Reactions] = {
        **Receiver.reactions,
        State.WAITING: {
            RoomMade: _ask_for_answer,
            Tick: Receiver._look_at_limit,
            CancelAsked: Receiver._free,
            PeerGone: Receiver._lose,
            Decision.OVERDUE: Receiver._lose,
        },
        State.FETCHING: {**_open, Accepted: _hear_how_far},
        State.EXTENDING: {
            **_open,
            Extended: _take_room,
            RoomRefused: _give_room_up,
            Decision.FAULT: Receiver._fail,
        },
        State.LANDING: {**Receiver.reactions[State.LANDING], Decision.COVERED: _give_licence},
    }


def _runs(required: tuple[GroupRuns, ...]) -> dict[int, object]:
    return {entry.group: entry.runs for entry in required if entry.runs}
