"""The source of a move: it decodes an answer until a FETCH is admitted, then stands still until the router has decided.

    FETCH      admitted by the ticket of this leg; the engine freezes the answer between two steps
    ACCEPTED   how far the answer has come, so that both ends compute what must move
    RECEIVED   the sink has room for that: slices follow, and DONE with the newest token
    ACK        the sink decodes: the answer is over here

It never lets the answer go on by itself. Every other end than ACK leaves the answer frozen, if it was, and the worker
reports it; what happens then the router says. States and legal steps are in `state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from disagg.transceiver.layout.compatibility import Difference
from disagg.transceiver.layout.required import check_required, required_units
from disagg.transceiver.protocol.actions import AskPin
from disagg.transceiver.protocol.events import (
    CancelAsked,
    ComputeFailed,
    FinishedEarly,
    Frozen,
    LeaseRenewed,
    PeerGone,
    Tick,
    UnitsFinal,
)
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.state import Decision, Role, State
from disagg.transceiver.protocol.transfer import Ends, Reactions
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages.peer import MAX_UNTOLD, Accepted, Cancel, Fetch, Received
from disagg.transceiver.wire.messages.values import FirstToken, GroupRuns, SamplingState
from disagg.transceiver.wire.purposes import MOVE

FROZEN_ID: Final = 0
"""The computation that units of a frozen answer belong to: there is one."""


@dataclass(frozen=True, slots=True)
class MoveOffer:
    """What may be fetched: an answer to `offer.prompt`, of which the router has the tokens before `first_index`."""

    offer: Offer
    request: str
    first_index: int

    def claims(self, ends: Ends) -> ticket.LegClaims:
        """What the FETCH's ticket must have been minted for; the source is this end."""
        return ticket.move_claims(
            ends.transfer_id, ends.epoch, self.request, ends.me, ends.peer, self.offer.prompt, self.first_index
        )


class MoveSource(Sender):
    role: ClassVar[Role] = Role.MOVE_SOURCE
    purpose: ClassVar[str] = MOVE

    def __init__(self, ends: Ends, move: MoveOffer, now: float) -> None:
        super().__init__(ends, move.offer, now)
        self._move = move
        self._frozen: Frozen | None = None
        self._has_room = False

    @property
    def _boundary(self) -> int:
        """Tokens whose KV is stored: all but the newest."""
        assert self._frozen is not None
        return len(self._offer.prompt) + len(self._frozen.output) - 1

    def _check(self, subject: Any) -> None:
        super()._check(subject)
        if isinstance(subject, Frozen):
            num_untold = len(subject.output) - self._move.first_index
            if not 0 <= num_untold <= MAX_UNTOLD or len(subject.logprobs) not in (0, num_untold):
                raise LocalProtocolError(f"{len(subject.output)} tokens, the router has {self._move.first_index}")

    # --- FETCH ----------------------------------------------------------------------------------------------

    def _is_ticket_right(self, fetch: Fetch) -> bool:
        offer = self._offer
        return ticket.is_leg_ticket(offer.keys.ticket, fetch.ticket, self._move.claims(self.ends), offer.ttl_s)

    def _wrong_field(self, fetch: Fetch) -> Difference | None:
        known = len(self._offer.prompt) + self._move.first_index - 1
        if fetch.purpose != MOVE:
            return "purpose", MOVE, fetch.purpose
        if not self._is_ticket_right(fetch):
            return "ticket", "the router's, of this move", "another"
        if fetch.prompt_len != known:
            return "prompt_len", str(known), str(fetch.prompt_len)
        if fetch.plane not in self._offer.planes:
            return "plane", ", ".join(self._offer.planes), fetch.plane
        if (fault := self._fault_in_held(fetch)) is not None:
            return "held", "blocks of the tokens that the router has", fault
        return None

    def _fault_in_held(self, fetch: Fetch) -> str | None:
        geometry = self._offer.geometry
        num_whole = fetch.prompt_len // geometry.block_size
        runs = ((0, num_whole),) if num_whole else ()
        try:
            check_required(fetch.held, [GroupRuns(group, runs) for group in range(len(geometry.groups))])
        except RemoteProtocolError as exc:
            return str(exc)
        return "required" if fetch.required else None

    def _admit(self, fetch: Fetch) -> None:
        self._do(AskPin())

    def _accept(self) -> None:
        if self._frozen is not None:  # else ACCEPTED would say nothing yet
            self._say_accepted()

    # --- standing still -------------------------------------------------------------------------------------

    def _stand_still(self, event: Frozen) -> None:
        assert self._fetch is not None
        self._frozen = event
        geometry = self._offer.geometry
        held: list[tuple[int, ...]] = [()] * len(geometry.groups)
        for entry in self._fetch.held:
            held[entry.group] = entry.ordinals
        required = required_units(geometry.groups, self._boundary, geometry.block_size, held)
        self._expect(required)
        self._say_accepted()

    def _say_accepted(self) -> None:
        frozen, first = self._frozen, self._move.first_index
        assert frozen is not None
        output = tuple(frozen.output[first:])
        self._send(Accepted(self._header(), 0, self._boundary, output=output, logprobs=frozen.logprobs))

    def _add_units(self, event: UnitsFinal) -> None:
        self._outbox.add(event.units)
        self._go_on()

    def _take_received(self, message: Received) -> None:
        """The first says that the sink has room for all that is to come."""
        self._has_room = True
        self._acknowledge(message)
        self._go_on()

    def _go_on(self) -> None:
        if self._has_room:
            self._announce()
            if self._outbox.is_all_announced:
                self._decide(Decision.ALL_ANNOUNCED)

    def _say_done(self, decision: Decision) -> None:
        frozen = self._frozen
        assert frozen is not None
        logprobs = frozen.logprobs[-1] if frozen.logprobs else None
        self._first_token = FirstToken(frozen.output[-1], logprobs, SamplingState(frozen.seed))
        tip = ticket.prompt_hash((*self._offer.prompt, *frozen.output))
        self._insist(self._sealed_done(boundary=self._boundary, tip=tip))

    # --- what to do on each step ----------------------------------------------------------------------------

    reactions: ClassVar[Reactions] = {
        State.WAITING: {
            Fetch: Sender._judge,
            Tick: Sender._look_at_limits,
            Cancel: Sender._cancelled_soft,
            PeerGone: Sender._lose_peer,
            **dict.fromkeys((CancelAsked, FinishedEarly, ComputeFailed, Decision.OVERDUE), Sender._stop_unasked),
        },
        State.PINNING: {
            Fetch: Sender._accept_again,
            Frozen: _stand_still,
            LeaseRenewed: Sender._renew_lease,
            Tick: Sender._look_at_limits,
            Cancel: Sender._cancelled_soft,
            PeerGone: Sender._lose_peer,
            **dict.fromkeys((CancelAsked, FinishedEarly, ComputeFailed, Decision.OVERDUE), Sender._stop),
        },
        State.SENDING: {
            Fetch: Sender._accept_again,
            UnitsFinal: _add_units,
            Received: _take_received,
            LeaseRenewed: Sender._renew_lease,
            Tick: Sender._look_at_limits,
            Decision.ALL_ANNOUNCED: _say_done,
            Cancel: Sender._cancelled,
            PeerGone: Sender._lose_peer,
            **dict.fromkeys((CancelAsked, ComputeFailed, Decision.OVERDUE), Sender._stop),
        },
        **{state: Sender.reactions[state] for state in (State.DECIDED, State.STOPPED, State.CLOSED)},
    }
