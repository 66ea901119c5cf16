"""The prefill end of a transfer: admits one FETCH, announces units as they become final, says one terminal word.

States and legal steps are in `state.py`; what is done on each of them is in `Sender.reactions`, the table at the end of
the class. Before a FETCH is admitted the prompt is computed softly, maybe more than once; `_Computation` holds what
each computation reported. `Pinned` names the one that stays, and only its units are announced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from disagg.transceiver.layout.compatibility import Difference
from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import check_required
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.protocol.actions import AskPin, ReleaseSource, SendPayload, UnregisterUnits
from disagg.transceiver.protocol.events import (
    CancelAsked,
    ComputeFailed,
    FinishedEarly,
    LeaseRenewed,
    PeerGone,
    Pinned,
    PromptComputed,
    SoftDropped,
    Tick,
    UnitsFinal,
)
from disagg.transceiver.protocol.manifest import seal
from disagg.transceiver.protocol.outbox import Outbox
from disagg.transceiver.protocol.state import Decision, Role, State
from disagg.transceiver.protocol.transfer import Ends, Reactions, Transfer
from disagg.transceiver.wire import reasons, ticket
from disagg.transceiver.wire.errors import RemoteProtocolError, TicketRefused
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.digests import GroupDigests
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
from disagg.transceiver.wire.messages.values import (
    FirstToken,
    Geometry,
    GroupRuns,
    UnitName,
    UnitRun,
    nameable,
)
from disagg.transceiver.wire.repeat import Repeat
from disagg.transceiver.wire.sizes import MAX_MANIFEST_ENTRIES
from disagg.transceiver.wire.timing import LEASE_S


@dataclass(slots=True)
class _Computation:
    units: list[HashedUnit] = field(default_factory=list)
    first_token: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What the router ordered and this worker can do: everything a FETCH is judged by.

    `prompt`: for `prefix` the tokens up to the boundary. `planes`: those offered to this peer, each with whether the
    sender pushes its bytes. `unit_nbytes`: slot bytes per group. `ttl_s` is DISPATCH's, exactly: it is bound by the
    ticket. `part`: what this pair of ranks moves. `output`: of an answer that goes on, its tokens so far, whose KV
    moves with the prompt's.
    """

    prompt: tuple[int, ...]
    geometry: Geometry
    unit_nbytes: tuple[int, ...]
    planes: Mapping[str, bool]
    keys: ClusterKeys
    ttl_s: float
    part: Part
    output: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Tokens before the one that the receiver emits first: P."""
        return len(self.prompt) + len(self.output)


_Cause = CancelAsked | FinishedEarly | ComputeFailed | Decision
"""What makes this end stop by itself; of the decisions INCOMPLETE and OVERDUE."""


class Sender(Transfer):
    role: ClassVar[Role] = Role.SENDER

    def __init__(self, ends: Ends, offer: Offer, now: float) -> None:
        super().__init__(ends, offer.ttl_s, now)
        self._offer = offer
        self._computations: dict[int, _Computation] = {}
        self._pinned: int | None = None
        self._first_token: FirstToken | None = None
        self._fetch: Fetch | None = None
        self._outbox = Outbox((), offer.unit_nbytes, pushes_bytes=False)
        self._slice_repeat = Repeat()
        self._lease_end: float | None = None

    def _check(self, subject: Any) -> None:
        if isinstance(subject, Received) and not -1 <= subject.number < self._outbox.num_slices:
            raise RemoteProtocolError(f"RECEIVED {subject.number}, but {self._outbox.num_slices} slices were announced")

    # --- FETCH ----------------------------------------------------------------------------------------------

    def _judge(self, fetch: Fetch) -> None:
        """Admit it, or say which field is wrong and stay as we are: a forged FETCH must not end an honest transfer."""
        if (wrong := self._wrong_field(fetch)) is not None:
            self._refuse(*wrong)
            return
        self._decide(Decision.ADMIT)
        self._fetch = fetch
        self._lease_end = self._now + LEASE_S
        self._admit(fetch)

    def _wrong_field(self, fetch: Fetch) -> Difference | None:
        """What it asks for that was not ordered."""
        offer = self._offer
        if fetch.purpose != self.purpose:
            return "purpose", self.purpose, fetch.purpose
        if not self._is_ticket_right(fetch):
            return "ticket", "the router's, of this transfer and epoch", "another"
        if fetch.prompt_len != offer.num_known:
            return "prompt_len", str(offer.num_known), str(fetch.prompt_len)
        if fetch.plane not in offer.planes:
            return "plane", ", ".join(offer.planes), fetch.plane
        return self._wrong_units(fetch)

    def _is_ticket_right(self, fetch: Fetch) -> bool:
        ends, offer = self.ends, self._offer
        try:
            ticket.check(
                offer.keys.ticket,
                fetch.ticket,
                transfer_id=ends.transfer_id,
                epoch=ends.epoch,
                prefill=ends.me,
                decode=ends.peer,
                prompt=offer.prompt,
                ttl_s=offer.ttl_s,
                output=offer.output,
            )
        except TicketRefused:
            return False
        return True

    def _wrong_units(self, fetch: Fetch) -> Difference | None:
        geometry = self._offer.geometry
        try:
            need = self._offer.part.needed(geometry.groups, fetch.prompt_len, geometry.block_size)
            check_required(fetch.required, need)
        except RemoteProtocolError as exc:
            return "required", "part of what is needed", str(exc)
        return too_many(fetch.required)

    def _admit(self, fetch: Fetch) -> None:
        self._expect(fetch.required)
        self._do(AskPin())
        self._accept()

    def _expect(self, required: Iterable[GroupRuns]) -> None:
        """These units are to be announced."""
        keys = [(entry.group, ordinal) for entry in required for ordinal in entry.ordinals]
        self._outbox = Outbox(keys, self._offer.unit_nbytes, pushes_bytes=self._pushes_bytes)

    def _accept(self) -> None:
        self._send(Accepted(self._header(), 0))

    def _accept_again(self, fetch: Fetch) -> None:
        """One was admitted: this must be its repeat."""
        assert self._fetch is not None
        if replace(fetch, header=self._fetch.header) == self._fetch:
            self._accept()
        else:
            self._refuse("required", "one FETCH per epoch", "another FETCH")

    def _refuse(self, name: str, ours: str, theirs: str) -> None:
        ends = self.ends
        self._send(Refused(name, ours, theirs, transfer_id=ends.transfer_id, epoch=ends.epoch))

    # --- computing and announcing ---------------------------------------------------------------------------

    def _keep_units(self, event: UnitsFinal) -> None:
        self._computation(event.compute_id).units.extend(event.units)

    def _keep_first_token(self, event: PromptComputed) -> None:
        self._computation(event.compute_id).first_token = event.first_token

    def _drop_computation(self, event: SoftDropped) -> None:
        self._computations.pop(event.compute_id, None)

    def _begin(self, event: Pinned) -> None:
        self._pinned = event.compute_id
        computation = self._computation(event.compute_id)
        self._computations = {}
        self._first_token = computation.first_token
        self._outbox.add(computation.units)
        self._announce()
        self._try_done()

    def _announce_units(self, event: UnitsFinal) -> None:
        if event.compute_id == self._pinned:
            self._outbox.add(event.units)
            self._announce()

    def _take_first_token(self, event: PromptComputed) -> None:
        if event.compute_id == self._pinned:
            self._first_token = event.first_token
            self._try_done()

    def _announce(self) -> None:
        numbers = self._outbox.cut()
        for number in numbers:
            self._send_slice(number)
            if self._pushes_bytes:
                self._do(SendPayload(number, self._outbox.slice_units(number)))
        if numbers and self._slice_repeat.at is None:
            self._slice_repeat.start(self._now)

    def _send_slice(self, number: int) -> None:
        self._send(Slice(self._header(), number, unit_runs(self._outbox.slice_units(number), not self._pushes_bytes)))

    def _announce_more(self, message: Received) -> None:
        """What has landed makes room for slices that wait."""
        if self._acknowledge(message):
            self._announce()
            self._try_done()

    def _acknowledge(self, message: Received) -> bool:
        if not self._outbox.acknowledge(message.number):
            return False
        self._slice_repeat.stop()
        if self._outbox.unanswered:
            self._slice_repeat.start(self._now)
        return True

    def _try_done(self) -> None:
        """The prompt is computed: say DONE once everything is announced, or fail if something never will be."""
        if self._first_token is None:
            return
        if self._outbox.is_all_announced:
            self._decide(Decision.ALL_ANNOUNCED)
        elif self._outbox.missing:
            self._decide(Decision.INCOMPLETE)

    def _say_done(self, decision: Decision) -> None:
        self._insist(self._sealed_done())

    def _sealed_done(self, **bound: Any) -> Done:
        """`bound`: what else the MAC of this purpose binds."""
        part = self._offer.part
        return seal(
            self._offer.keys.manifest_mac,
            self._header(),
            rank=part.rank,
            num_ranks=part.num_ranks,
            num_slices=self._outbox.num_slices,
            manifest=self._manifest(),
            first_token=self._first_token if part.rank == 0 else None,
            purpose=self.purpose,
            **bound,
        )

    def _manifest(self) -> tuple[GroupDigests, ...]:
        digests: dict[int, dict[int, int]] = {}
        for unit in self._outbox.announced:
            digests.setdefault(unit.group, {})[unit.ordinal] = unit.digest
        return tuple(
            GroupDigests.of(group, rectangle, digests[group])
            for group, rectangle in enumerate(self._offer.part.rectangles)
            if rectangle is not None and group in digests
        )

    # --- endings --------------------------------------------------------------------------------------------

    def _ending(self, cause: _Cause) -> tuple[Failed | Cancelled, str]:
        """The terminal word that `cause` asks for, and the reason of the release."""
        header = self._header()
        match cause:
            case CancelAsked(reason):
                return Cancelled(header, reason), reasons.CANCELLED
            case FinishedEarly():
                return Cancelled(header, reasons.FINISHED), reasons.FINISHED
            case ComputeFailed(reason):
                return Failed(header, reason), reasons.FAILED
            case Decision.INCOMPLETE:
                units = tuple(UnitName(group, ordinal) for group, ordinal in self._outbox.missing)
                return Failed(header, reasons.INCOMPLETE, nameable(units)), reasons.FAILED
        if self._now >= self.deadline:
            return Failed(header, reasons.DEADLINE), reasons.DEADLINE
        return Failed(header, reasons.LEASE), reasons.LOST

    def _stop(self, cause: _Cause) -> None:
        word, release = self._ending(cause)
        self._insist(word)
        self._give_up_later()
        self._slice_repeat.stop()
        self._do(ReleaseSource(release))

    def _stop_unasked(self, cause: _Cause) -> None:
        """No peer has asked yet: the tombstone tells the one that does."""
        self.last_word, release = self._ending(cause)
        self._do(ReleaseSource(release))

    def _stop_decided(self, cause: _Cause) -> None:
        """The terminal word was said before: a peer that still asks is told CLOSED."""
        word, release = self._ending(cause)
        self.last_word = Closed(word.header)
        self._do(ReleaseSource(release))

    def _acked(self, message: Ack) -> None:
        self._say_closed(message)
        self._do(ReleaseSource("acked"))

    def _say_closed(self, message: Ack | Cancel) -> None:
        self.last_word = Closed(self._header())
        self._send(self.last_word)

    def _say_cancelled(self, message: Cancel) -> None:
        self.last_word = Cancelled(self._header(), message.reason)
        self._send(self.last_word)

    def _cancelled_soft(self, message: Cancel) -> None:
        self._say_cancelled(message)
        self._do(ReleaseSource(reasons.CANCELLED))

    def _cancelled(self, message: Cancel) -> None:
        self._say_cancelled(message)
        self._let_go(message)

    def _cancelled_decided(self, message: Cancel) -> None:
        """DONE was the terminal word, so CANCELLED cannot be."""
        self._say_closed(message)
        self._let_go(message)

    def _let_go(self, message: Cancel) -> None:
        """Where the peer's digests disagree with ours, the units that were announced must not be reused."""
        if message.reason in (reasons.DIGEST, reasons.NON_FINITE):
            announced = dict.fromkeys((unit.group, unit.ordinal) for unit in self._outbox.announced)
            named = {(unit.group, unit.ordinal) for unit in message.units} or announced  # too many to name: any of them
            self._do(UnregisterUnits(tuple(UnitName(*key) for key in announced if key in named)))
        self._do(ReleaseSource(reasons.CANCELLED))

    def _lose_peer(self, event: PeerGone) -> None:
        self._do(ReleaseSource(reasons.LOST))

    # --- time -----------------------------------------------------------------------------------------------

    def _renew_lease(self, event: LeaseRenewed) -> None:
        self._lease_end = self._now + LEASE_S

    def _look_at_limits(self, event: Tick) -> None:
        if self._now >= min(at for at in self._limits() if at is not None):
            self._decide(Decision.OVERDUE)
            return
        if self._slice_repeat.take(self._now):
            for number in self._outbox.unanswered:
                self._send_slice(number)
        if self._repeat.take(self._now):
            self._repeat_last_word()

    # --- facts ----------------------------------------------------------------------------------------------

    @property
    def _pushes_bytes(self) -> bool:
        return self._fetch is not None and self._offer.planes[self._fetch.plane]

    def _computation(self, compute_id: int) -> _Computation:
        return self._computations.setdefault(compute_id, _Computation())

    def _limits(self) -> tuple[float | None, ...]:
        """When to give up: on the peer's answer once stopped, before that on the request and on its lease."""
        return (self._give_up_at,) if self.state is State.STOPPED else (self.deadline, self._lease_end)

    def _alarms(self) -> tuple[float | None, ...]:
        if self.state is State.CLOSED:
            return ()
        return (*self._limits(), self._repeat.at, self._slice_repeat.at)

    # --- what to do on each step ----------------------------------------------------------------------------

    reactions: ClassVar[Reactions] = {
        State.WAITING: {
            Fetch: _judge,
            UnitsFinal: _keep_units,
            PromptComputed: _keep_first_token,
            SoftDropped: _drop_computation,
            Tick: _look_at_limits,
            Cancel: _cancelled_soft,
            PeerGone: _lose_peer,
            **dict.fromkeys((CancelAsked, FinishedEarly, ComputeFailed, Decision.OVERDUE), _stop_unasked),
        },
        State.PINNING: {
            Fetch: _accept_again,
            UnitsFinal: _keep_units,
            PromptComputed: _keep_first_token,
            SoftDropped: _drop_computation,
            Pinned: _begin,
            LeaseRenewed: _renew_lease,
            Tick: _look_at_limits,
            Cancel: _cancelled_soft,
            PeerGone: _lose_peer,
            **dict.fromkeys((CancelAsked, FinishedEarly, ComputeFailed, Decision.OVERDUE), _stop),
        },
        State.SENDING: {
            Fetch: _accept_again,
            UnitsFinal: _announce_units,
            PromptComputed: _take_first_token,
            Received: _announce_more,
            LeaseRenewed: _renew_lease,
            Tick: _look_at_limits,
            Decision.ALL_ANNOUNCED: _say_done,
            Cancel: _cancelled,
            PeerGone: _lose_peer,
            **dict.fromkeys((CancelAsked, FinishedEarly, ComputeFailed, Decision.INCOMPLETE, Decision.OVERDUE), _stop),
        },
        State.DECIDED: {
            Fetch: _accept_again,
            Received: _acknowledge,
            LeaseRenewed: _renew_lease,
            Tick: _look_at_limits,
            Ack: _acked,
            Cancel: _cancelled_decided,
            PeerGone: _lose_peer,
            **dict.fromkeys((CancelAsked, Decision.OVERDUE), _stop_decided),
        },
        State.STOPPED: {
            **dict.fromkeys((Fetch, Received), Transfer._repeat_last_word),
            **dict.fromkeys((Ack, Cancel), _say_closed),
            Tick: _look_at_limits,
        },
        State.CLOSED: {
            **dict.fromkeys((Fetch, Received), Transfer._repeat_last_word),
            **dict.fromkeys((Ack, Cancel), _say_closed),
        },
    }


def too_many(required: Iterable[GroupRuns]) -> Difference | None:
    """More units than one DONE could name: said before a block is moved."""
    num_units = sum(count for entry in required for _, count in entry.runs)
    if num_units <= MAX_MANIFEST_ENTRIES:
        return None
    return "required", f"at most {MAX_MANIFEST_ENTRIES} units", f"{num_units} units"


def unit_runs(units: tuple[HashedUnit, ...], with_slots: bool) -> tuple[UnitRun, ...]:
    """Units in slice order as runs of consecutive ordinals of one group; slots and generations where they are read."""
    runs: list[list[HashedUnit]] = []
    for unit in units:
        if runs and (unit.group, unit.ordinal) == (runs[-1][-1].group, runs[-1][-1].ordinal + 1):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return tuple(_run(run, with_slots) for run in runs)


def _run(units: list[HashedUnit], with_slots: bool) -> UnitRun:
    slots = tuple(u.slot for u in units) if with_slots else ()
    generations = tuple(u.generation for u in units) if with_slots else ()
    return UnitRun(units[0].group, units[0].ordinal, len(units), slots, generations)
