"""The decode end of a transfer: asks for what was reserved, lands it, and gives exactly one verdict.

The verdict is `Verified` only when DONE's MAC holds, its manifest covers exactly what was required, and every landed
unit, hashed where it lies, has the manifest's digest. Anything else ends in `ReportFailed` or `FreeReservation`, after
every landing job has been joined. States and legal steps are in `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import check_required
from disagg.transceiver.protocol.actions import FreeReservation, Land, PartVerified, ReportFailed, StopLanding, Verified
from disagg.transceiver.protocol.events import (
    CancelAsked,
    LandingFailed,
    LandingStopped,
    PeerGone,
    Reserved,
    SliceLanded,
    Tick,
)
from disagg.transceiver.protocol.inbox import BadSliceError, Inbox
from disagg.transceiver.protocol.manifest import is_sealed
from disagg.transceiver.protocol.side import Ends, Side
from disagg.transceiver.protocol.state import Kind, Role, State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError, clipped
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.peer import (
    Accepted,
    Ack,
    Cancel,
    Cancelled,
    Closed,
    Done,
    Failed,
    Fetch,
    Received,
    Refused,
    Slice,
)
from disagg.transceiver.wire.messages.values import FirstToken, Geometry, UnitName
from disagg.transceiver.wire.repeat import Repeat

_OPEN = (State.FETCHING, State.LANDING)
"""The states in which the verdict is still open and the peer has been asked."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the router ordered: the ticket to show, the plane to use, and how long it may take."""

    ticket: bytes
    plane: str
    geometry: Geometry
    keys: ClusterKeys
    deadline_s: float
    part: Part


class Receiver(Side):
    role: ClassVar[Role] = Role.RECEIVER

    def __init__(self, ends: Ends, order: Order, now: float) -> None:
        super().__init__(ends, order.deadline_s, now)
        self._order = order
        self._inbox = Inbox(())
        self._poll = Repeat()
        self._done: Done | None = None
        self._outcome: ReportFailed | FreeReservation | None = None

    def _reactions(self) -> Mapping[Kind, Callable[[Any], None]]:
        return {
            Kind.RESERVED: self._on_reserved,
            Kind.ACCEPTED: self._on_accepted,
            Kind.SLICE: self._on_slice,
            Kind.DONE: self._on_done,
            Kind.FAILED: self._on_failed,
            Kind.CANCELLED: self._on_cancelled,
            Kind.REFUSED: self._on_refused,
            Kind.CLOSED: self._on_closed,
            Kind.SLICE_LANDED: self._on_slice_landed,
            Kind.LANDING_FAILED: self._on_landing_failed,
            Kind.LANDING_STOPPED: self._on_landing_stopped,
            Kind.CANCEL_ASKED: self._on_cancel_asked,
            Kind.PEER_GONE: self._on_peer_gone,
            Kind.TICK: self._on_tick,
        }

    def _check(self, kind: Kind, subject: Any) -> None:
        if kind is Kind.RESERVED:
            self._check_reserved(subject)
        if self.state is not State.LANDING:
            return
        if kind is Kind.SLICE_LANDED and not self._inbox.expects(subject.number, subject.units):
            raise LocalProtocolError(f"slice {subject.number} was not being landed with these units")
        if kind is Kind.LANDING_FAILED and not self._inbox.is_landing(subject.number):
            raise LocalProtocolError(f"slice {subject.number} was not being landed")

    def _check_reserved(self, event: Reserved) -> None:
        geometry = self._order.geometry
        try:
            need = self._order.part.needed(geometry.groups, event.prompt_len, geometry.block_size)
            check_required(event.required, need)
        except RemoteProtocolError as exc:
            raise LocalProtocolError(f"reserved what no transfer brings: {exc}") from exc

    # --- asking and landing ---------------------------------------------------------------------------------

    def _on_reserved(self, event: Reserved) -> None:
        if self.state is State.CLOSED:
            return
        required = tuple(entry for entry in event.required if entry.runs)
        self._inbox = Inbox((entry.group, ordinal) for entry in required for ordinal in entry.ordinals)
        self._insist(Fetch(self._header(), self._order.ticket, event.prompt_len, required, self._order.plane))

    def _on_accepted(self, message: Accepted) -> None:
        if self._was is State.FETCHING:
            self._repeat.stop()

    def _on_slice(self, message: Slice) -> None:
        if self.state is not State.LANDING:
            return
        self._repeat.stop()
        try:
            is_new = self._inbox.announce(message)
        except BadSliceError:
            self._fault(reasons.PROTOCOL)
            return
        if self._done is not None and message.number >= self._done.num_slices:
            self._fault(reasons.PROTOCOL)
        elif is_new:
            self._poll.start(self._now)
            self._do(Land(message))
        else:
            self._send(Received(self._header(), self._inbox.highest))

    def _on_slice_landed(self, event: SliceLanded) -> None:
        if self.state is not State.LANDING:
            return
        bad = tuple(UnitName(unit.group, unit.ordinal) for unit in event.units if not unit.finite)
        if bad:
            self._fault(reasons.NON_FINITE, bad)
            return
        self._poll.start(self._now)
        before = self._inbox.highest
        self._inbox.land(event.number, event.units)
        if self._inbox.highest > before:
            self._send(Received(self._header(), self._inbox.highest))
        self._try_verify()

    # --- the verdict ----------------------------------------------------------------------------------------

    def _on_done(self, done: Done) -> None:
        if self.state is not State.LANDING:
            self._answer_again()
        elif self._done is None:
            self._repeat.stop()
            problem = self._problem_of(done)
            if problem is None:
                self._done = done
                self._poll.start(self._now)
                self._try_verify()
            else:
                self._fault(problem)

    def _problem_of(self, done: Done) -> str | None:
        """Why this DONE cannot be right, before any byte is compared."""
        if not is_sealed(self._order.keys.manifest_mac, done):
            return reasons.MAC
        keys = [(entry.group, entry.ordinal) for entry in done.manifest]
        if len(keys) != len(self._inbox.required) or set(keys) != self._inbox.required:
            return reasons.PROTOCOL
        part = self._order.part
        if any(entry.rectangle != part.rectangles[entry.group] for entry in done.manifest):
            return reasons.PROTOCOL
        is_whole = (done.rank, done.num_ranks) == (part.rank, part.num_ranks)
        is_whole = is_whole and (done.first_token is not None) == (part.rank == 0)
        is_counted = self._inbox.highest_announced < done.num_slices <= len(keys)
        return None if is_whole and is_counted else reasons.PROTOCOL

    def _try_verify(self) -> None:
        """DONE waits for the slices it overtook; when all have landed, the digests decide."""
        done = self._done
        if done is None or not self._inbox.is_all_landed:
            return
        wrong = self._inbox.disagreeing(done.manifest)
        if self._inbox.num_announced != done.num_slices:
            self._fault(reasons.PROTOCOL)
        elif wrong:
            self._fault(reasons.DIGEST, wrong)
        else:
            self._give_licence(done.first_token)

    def _give_licence(self, first_token: FirstToken | None) -> None:
        self._decide(Kind.COVERED)
        # ACK first: the sequence may decode only after the sources were told that they are free.
        self._insist(Ack(self._header()))
        self._give_up_later()
        if self._order.part.is_joined:
            self._do(PartVerified(first_token))
        else:
            assert first_token is not None, "rank 0 sends the first token"
            self._do(Verified(self.ends.transfer_id, self.ends.epoch, first_token))

    def _fault(self, reason: str, units: tuple[UnitName, ...] = ()) -> None:
        self._decide(Kind.FAULT)
        self._stop(reason, ReportFailed(reason, units), units)

    def _stop(self, reason: str, outcome: ReportFailed | FreeReservation, units: tuple[UnitName, ...] = ()) -> None:
        """Join every job, then give `outcome`. CANCEL frees the peer's sources, unless the peer is past hearing it."""
        self._outcome = outcome
        self._repeat.stop()
        if self.state is State.STOPPING:
            self._insist(Cancel(self._header(), reason, units))
            self._give_up_later()
        self._do(StopLanding())

    # --- the peer ends it -----------------------------------------------------------------------------------

    def _on_failed(self, message: Failed) -> None:
        if self._was in _OPEN:
            self._stop(reasons.FAILED, ReportFailed(message.reason, message.units))
        else:
            self._answer_again()

    def _on_cancelled(self, message: Cancelled) -> None:
        if self._was in _OPEN:
            is_finished = message.reason == reasons.FINISHED
            outcome = FreeReservation(message.reason) if is_finished else ReportFailed(message.reason)
            self._stop(message.reason, outcome)
        else:
            self._repeat.stop()
            self._answer_again()

    def _on_refused(self, message: Refused) -> None:
        if self._was in _OPEN:
            ours, theirs = clipped(message.ours), clipped(message.theirs)
            why = f"{reasons.REFUSED}: {clipped(message.field)}: expected {ours}, got {theirs}"
            self._stop(reasons.REFUSED, ReportFailed(why))

    def _on_closed(self, message: Closed) -> None:
        self._repeat.stop()
        if self._was in _OPEN:
            self._stop(reasons.UNKNOWN, ReportFailed(reasons.UNKNOWN))

    def _on_peer_gone(self, event: PeerGone) -> None:
        self._repeat.stop()
        if self._was is State.WAITING:
            self._do(ReportFailed(reasons.LOST))
        elif self._was in _OPEN:
            self._stop(reasons.LOST, ReportFailed(reasons.LOST))

    # --- this process ends it -------------------------------------------------------------------------------

    def _on_cancel_asked(self, event: CancelAsked) -> None:
        if self._was is State.WAITING:
            self._do(FreeReservation(event.reason))
        elif self._was in _OPEN:
            self._stop(event.reason, FreeReservation(event.reason))
        elif self._was in (State.STOPPING, State.JOINING):
            self._outcome = FreeReservation(event.reason)

    def _on_landing_failed(self, event: LandingFailed) -> None:
        if self._was is State.LANDING:
            self._stop(event.reason, ReportFailed(event.reason, event.units), event.units)

    def _on_landing_stopped(self, event: LandingStopped) -> None:
        assert self._outcome is not None, "STOPPING and JOINING are entered through _stop"
        self._do(self._outcome)

    def _on_tick(self, event: Tick) -> None:
        limit = self._limit()
        if limit is not None and self._now >= limit:
            self._overdue()
        elif self._repeat.take(self._now):
            self._repeat_last_word()
        elif self.state is State.LANDING and self._poll.take(self._now):
            # A sender that said DONE and had to let go says no other word, and bytes that it was to push never come:
            # a receiver that waits for them must ask. One that is still there counts this as a RECEIVED it knows.
            self._send(Received(self._header(), self._inbox.highest))

    def _overdue(self) -> None:
        """No answer in time: before the verdict that is LOST, after it nothing is owed any more."""
        self._decide(Kind.OVERDUE)
        self._repeat.stop()
        self._give_up_at = None
        if self._was is State.WAITING:
            self._do(ReportFailed(reasons.LOST))
        elif self._was in _OPEN:
            self._stop(reasons.DEADLINE, ReportFailed(reasons.LOST))

    # --- facts ----------------------------------------------------------------------------------------------

    def _answer_again(self) -> None:
        """The peer repeats its terminal word: our answer was lost. CANCEL of an open exchange repeats by itself."""
        if self.state in (State.VERIFIED, State.CLOSED) and isinstance(self.last_word, Ack | Cancel):
            self._repeat_last_word()

    def _limit(self) -> float | None:
        if self.state in (State.JOINING, State.CLOSED):
            return None
        return self.deadline if self.state in (State.WAITING, *_OPEN) else self._give_up_at

    def _alarms(self) -> tuple[float | None, ...]:
        return (self._limit(), self._repeat.at, self._poll.at if self.state is State.LANDING else None)
