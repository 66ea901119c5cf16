"""The decode end of a transfer: asks for what was reserved, lands it, and gives exactly one verdict.

The verdict is `Verified` only when DONE's MAC holds, its manifest covers exactly what was required, and every landed
unit, hashed where it lies, has the manifest's digest. Anything else ends in `ReportFailed` or `FreeReservation`, after
every landing job has been joined. States and legal steps are in `state.py`; what is done on each of them is
in `Receiver.reactions`, the table at the end of the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import check_required
from disagg.transceiver.protocol.actions import FreeReservation, Land, PartVerified, ReportFailed, StopLanding, Verified
from disagg.transceiver.protocol.events import (
    CancelAsked,
    FetchWanted,
    LandingFailed,
    LandingStopped,
    PeerGone,
    Reserved,
    SliceLanded,
    Tick,
)
from disagg.transceiver.protocol.inbox import BadSliceError, Inbox
from disagg.transceiver.protocol.manifest import is_sealed
from disagg.transceiver.protocol.state import Decision, Role, State
from disagg.transceiver.protocol.transfer import Ends, Reactions, Transfer
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
    num_runs,
)
from disagg.transceiver.wire.messages.ranges import MAX_RUNS
from disagg.transceiver.wire.messages.values import Geometry, UnitName, nameable
from disagg.transceiver.wire.repeat import Repeat


@dataclass(frozen=True, slots=True)
class Order:
    """What the router ordered: DISPATCH's ticket to show, the plane agreed with the peer, how long it may take."""

    ticket: bytes
    plane: str
    geometry: Geometry
    keys: ClusterKeys
    deadline_s: float
    part: Part


class Receiver(Transfer):
    role: ClassVar[Role] = Role.RECEIVER

    def __init__(self, ends: Ends, order: Order, now: float) -> None:
        super().__init__(ends, order.deadline_s, now)
        self._order = order
        self._inbox = Inbox(())
        self._poll = Repeat()
        self._done: Done | None = None
        self._outcome: ReportFailed | FreeReservation | None = None

    def _check(self, subject: Any) -> None:
        is_landing = self.state is State.LANDING
        match subject:
            case FetchWanted():
                raise LocalProtocolError("a handoff is fetched once there is room for it")
            case Reserved() if is_landing:
                raise LocalProtocolError("there was room for this handoff before it was fetched")
            case Reserved():
                self._check_reserved(subject)
            case SliceLanded(number, units) if is_landing and not self._inbox.expects(number, units):
                raise LocalProtocolError(f"slice {number} was not being landed with these units")
            case LandingFailed(number=number) if is_landing and not self._inbox.is_landing(number):
                raise LocalProtocolError(f"slice {number} was not being landed")

    def _check_reserved(self, event: Reserved) -> None:
        geometry = self._order.geometry
        try:
            need = self._order.part.needed(geometry.groups, event.prompt_len, geometry.block_size)
            check_required(event.required, need)
        except RemoteProtocolError as exc:
            raise LocalProtocolError(f"reserved what no transfer brings: {exc}") from exc
        if num_runs(event.required) > MAX_RUNS:
            raise LocalProtocolError(f"reserved {num_runs(event.required)} runs, one FETCH names at most {MAX_RUNS}")

    # --- asking and landing ---------------------------------------------------------------------------------

    def _ask(self, event: Reserved) -> None:
        required = tuple(entry for entry in event.required if entry.runs)
        self._inbox = Inbox((entry.group, ordinal) for entry in required for ordinal in entry.ordinals)
        self._insist(Fetch(self._header(), self._order.ticket, event.prompt_len, required, self._order.plane))

    def _take_accepted(self, message: Accepted) -> None:
        self._repeat.stop()

    def _take_slice(self, message: Slice) -> None:
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
            self._land(message)
        else:
            self._send(Received(self._header(), self._inbox.highest))

    def _land(self, message: Slice) -> None:
        self._do(Land(message))

    def _take_landed(self, event: SliceLanded) -> None:
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

    def _take_done(self, done: Done) -> None:
        if self._done is not None:
            return
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
        if done.purpose != self.purpose:
            return reasons.PURPOSE
        if not self._is_sealed(done):
            return reasons.MAC
        if not self._inbox.is_covered(done.manifest):
            return reasons.PROTOCOL
        part = self._order.part
        if any(entry.rectangle != part.rectangles[entry.group] for entry in done.manifest):
            return reasons.PROTOCOL
        is_whole = (done.rank, done.num_ranks) == (part.rank, part.num_ranks)
        is_whole = is_whole and (done.first_token is not None) == self._has_first_token and not done.precision
        is_counted = self._inbox.highest_announced < done.num_slices <= len(self._inbox.required)
        return None if is_whole and is_counted else reasons.PROTOCOL

    @property
    def _has_first_token(self) -> bool:
        return self._order.part.rank == 0

    def _is_sealed(self, done: Done) -> bool:
        return is_sealed(self._order.keys.manifest_mac, done)

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
            self._decide(Decision.COVERED, done)

    def _give_licence(self, done: Done) -> None:
        # ACK first: the sequence may decode only after the sources were told that they are free.
        self._insist(Ack(self._header()))
        self._give_up_later()
        if self._order.part.is_joined:
            self._do(PartVerified(done.first_token))
        else:
            assert done.first_token is not None, "rank 0 sends the first token"
            self._do(Verified(self.ends.transfer_id, self.ends.epoch, done.first_token))

    def _fault(self, reason: str, units: tuple[UnitName, ...] = ()) -> None:
        self._decide(Decision.FAULT, ReportFailed(reason, units))

    # --- endings --------------------------------------------------------------------------------------------

    def _fail(self, fault: ReportFailed) -> None:
        self._stop(fault.reason, fault, fault.units)

    def _fail_landing(self, event: LandingFailed) -> None:
        self._stop(event.reason, ReportFailed(event.reason, event.units), event.units)

    def _fail_late(self, decision: Decision) -> None:
        self._stop(reasons.DEADLINE, ReportFailed(reasons.LOST))

    def _failed(self, message: Failed) -> None:
        self._stop(reasons.FAILED, ReportFailed(message.reason, message.units))

    def _refused(self, message: Refused) -> None:
        ours, theirs = clipped(message.ours), clipped(message.theirs)
        why = f"{reasons.REFUSED}: {clipped(message.field)}: expected {ours}, got {theirs}"
        self._stop(reasons.REFUSED, ReportFailed(why))

    def _cancelled(self, message: Cancelled) -> None:
        is_finished = message.reason == reasons.FINISHED
        outcome = FreeReservation(message.reason) if is_finished else ReportFailed(message.reason)
        self._stop(message.reason, outcome)

    def _cancel(self, event: CancelAsked) -> None:
        self._stop(event.reason, FreeReservation(event.reason))

    def _stop(self, reason: str, outcome: ReportFailed | FreeReservation, units: tuple[UnitName, ...] = ()) -> None:
        """Join every job, then give `outcome`. CANCEL, repeated until answered, frees the peer's sources."""
        self._insist(Cancel(self._header(), reason, nameable(units)))
        self._give_up_later()
        self._join(outcome)

    def _join(self, outcome: ReportFailed | FreeReservation) -> None:
        self._outcome = outcome
        self._do(StopLanding())

    def _join_unknown(self, message: Closed) -> None:
        self._stop_repeating(message)
        self._join(ReportFailed(reasons.UNKNOWN))

    def _join_lost(self, event: PeerGone) -> None:
        self._stop_repeating(event)
        self._join(ReportFailed(reasons.LOST))

    def _report(self, event: LandingStopped) -> None:
        assert self._outcome is not None, "STOPPING and JOINING are entered with an outcome"
        self._do(self._outcome)

    def _free_instead(self, event: CancelAsked) -> None:
        """The failure that the jobs are joined for concerns the router no more."""
        self._outcome = FreeReservation(event.reason)

    def _free(self, event: CancelAsked) -> None:
        self._do(FreeReservation(event.reason))

    def _lose(self, cause: PeerGone | Decision) -> None:
        self._do(ReportFailed(reasons.LOST))

    def _stop_repeating(self, cause: object) -> None:
        self._repeat.stop()

    def _answer_again(self, message: Done | Failed | Cancelled) -> None:
        """The peer repeats its terminal word: our answer was lost. CANCEL of an open exchange repeats by itself."""
        if isinstance(self.last_word, Ack | Cancel):
            self._repeat_last_word()

    # --- time -----------------------------------------------------------------------------------------------

    def _look_at_limit(self, event: Tick) -> bool:
        """True when something was done about it: no answer in time is LOST, and after the verdict nothing is owed."""
        limit = self._limit()
        if limit is not None and self._now >= limit:
            self._decide(Decision.OVERDUE)
        elif self._repeat.take(self._now):
            self._repeat_last_word()
        else:
            return False
        return True

    def _poll_sender(self, event: Tick) -> None:
        # A sender that said DONE and had to let go says no other word, and bytes that it was to push never come:
        # a receiver that waits for them must ask. One that is still there counts this as a RECEIVED it knows.
        if not self._look_at_limit(event) and self._poll.take(self._now):
            self._send(Received(self._header(), self._inbox.highest))

    def _limit(self) -> float | None:
        """The request's deadline while the verdict is open, then the end of insisting on an answer."""
        match self.state:
            case State.JOINING | State.CLOSED:
                return None
            case State.WAITING | State.FETCHING | State.EXTENDING | State.LANDING:
                return self.deadline
        return self._give_up_at

    def _alarms(self) -> tuple[float | None, ...]:
        return (self._limit(), self._repeat.at, self._poll.at if self.state is State.LANDING else None)

    # --- what to do on each step ----------------------------------------------------------------------------

    reactions: ClassVar[Reactions] = {
        State.WAITING: {
            Reserved: _ask,
            Tick: _look_at_limit,
            CancelAsked: _free,
            PeerGone: _lose,
            Decision.OVERDUE: _lose,
        },
        State.FETCHING: {
            Accepted: _take_accepted,
            Slice: _take_slice,
            Done: _take_done,
            Tick: _look_at_limit,
            Failed: _failed,
            Cancelled: _cancelled,
            Refused: _refused,
            CancelAsked: _cancel,
            Decision.OVERDUE: _fail_late,
            Closed: _join_unknown,
            PeerGone: _join_lost,
        },
        State.LANDING: {
            Accepted: _take_accepted,
            Slice: _take_slice,
            SliceLanded: _take_landed,
            Done: _take_done,
            Tick: _poll_sender,
            Decision.COVERED: _give_licence,
            Decision.FAULT: _fail,
            LandingFailed: _fail_landing,
            Failed: _failed,
            Cancelled: _cancelled,
            Refused: _refused,
            CancelAsked: _cancel,
            Decision.OVERDUE: _fail_late,
            Closed: _join_unknown,
            PeerGone: _join_lost,
        },
        State.VERIFIED: {
            Tick: _look_at_limit,
            **dict.fromkeys((Done, Failed, Cancelled), _answer_again),
        },
        State.STOPPING: {
            Tick: _look_at_limit,
            CancelAsked: _free_instead,
            LandingStopped: _report,
            **dict.fromkeys((Closed, Cancelled, PeerGone, Decision.OVERDUE), _stop_repeating),
        },
        State.JOINING: {
            CancelAsked: _free_instead,
            LandingStopped: _report,
        },
        State.CANCELLING: {
            Tick: _look_at_limit,
            Cancelled: _answer_again,
        },
        State.CLOSED: dict.fromkeys((Done, Failed, Cancelled), _answer_again),
    }
