"""The prefill end of a transfer: admits one FETCH, announces units as they become final, says one terminal word.

States and legal steps are in `state.py`. Before a FETCH is admitted the prompt is computed softly, maybe more than
once; `_Computation` holds what each computation reported. `Pinned` names the one that stays, and only its units are
announced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import check_required
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
    Unit,
    UnitsFinal,
)
from disagg.transceiver.protocol.manifest import seal
from disagg.transceiver.protocol.outbox import Outbox
from disagg.transceiver.protocol.side import Ends, Side
from disagg.transceiver.protocol.state import Kind, Role, State
from disagg.transceiver.wire import reasons, ticket
from disagg.transceiver.wire.codec import MAX_MANIFEST_ENTRIES
from disagg.transceiver.wire.errors import RemoteProtocolError, TicketRefused
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
from disagg.transceiver.wire.messages.values import FirstToken, Geometry, ManifestEntry, UnitName, UnitRun
from disagg.transceiver.wire.repeat import Repeat
from disagg.transceiver.wire.timing import LEASE_S


@dataclass(slots=True)
class _Computation:
    units: list[Unit] = field(default_factory=list)
    first_token: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What the router ordered and this worker can do: everything a FETCH is judged by.

    `planes`: name -> does the sender push bytes on it. `unit_nbytes`: slot bytes per group.
    """

    prompt: tuple[int, ...]
    geometry: Geometry
    unit_nbytes: tuple[int, ...]
    planes: Mapping[str, bool]
    keys: ClusterKeys
    ttl_s: float
    part: Part


class Sender(Side):
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
        self._is_released = False

    def _reactions(self) -> Mapping[Kind, Callable[[Any], None]]:
        return {
            Kind.FETCH: self._on_fetch,
            Kind.RECEIVED: self._on_received,
            Kind.ACK: self._on_ack,
            Kind.CANCEL: self._on_cancel,
            Kind.CANCEL_ASKED: self._on_cancel_asked,
            Kind.PEER_GONE: self._on_peer_gone,
            Kind.TICK: self._on_tick,
            Kind.LEASE_RENEWED: self._on_lease_renewed,
            Kind.PINNED: self._on_pinned,
            Kind.UNITS_FINAL: self._on_units_final,
            Kind.SOFT_DROPPED: self._on_soft_dropped,
            Kind.PROMPT_COMPUTED: self._on_prompt_computed,
            Kind.FINISHED_EARLY: self._on_finished_early,
            Kind.COMPUTE_FAILED: self._on_compute_failed,
        }

    def _check(self, kind: Kind, subject: Any) -> None:
        if kind is Kind.RECEIVED and not -1 <= subject.number < self._outbox.num_slices:
            raise RemoteProtocolError(f"RECEIVED {subject.number}, but {self._outbox.num_slices} slices were announced")

    # --- FETCH ----------------------------------------------------------------------------------------------

    def _on_fetch(self, fetch: Fetch) -> None:
        if self._was is State.WAITING:
            self._judge(fetch)
        elif self._was in (State.STOPPED, State.CLOSED):
            self._repeat_last_word()
        elif self._fetch is not None and replace(fetch, header=self._fetch.header) == self._fetch:
            self._send(Accepted(self._header(), 0))
        else:
            self._refuse("required", "one FETCH per epoch", "another FETCH")

    def _judge(self, fetch: Fetch) -> None:
        """Admit it, or say which field is wrong and stay as we are: a forged FETCH must not end an honest transfer."""
        offer = self._offer
        if not self._is_ticket_right(fetch):
            self._refuse("ticket", "the router's, of this transfer and epoch", "another")
        elif fetch.prompt_len != len(offer.prompt):
            self._refuse("prompt_len", str(len(offer.prompt)), str(fetch.prompt_len))
        elif fetch.plane not in offer.planes:
            self._refuse("plane", ", ".join(offer.planes), fetch.plane)
        else:
            self._admit_if_needed(fetch)

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
            )
        except TicketRefused:
            return False
        return True

    def _admit_if_needed(self, fetch: Fetch) -> None:
        geometry = self._offer.geometry
        try:
            need = self._offer.part.needed(geometry.groups, fetch.prompt_len, geometry.block_size)
            check_required(fetch.required, need)
        except RemoteProtocolError as exc:
            self._refuse("required", "part of what is needed", str(exc))
            return
        num_units = sum(count for entry in fetch.required for _, count in entry.runs)
        if num_units > MAX_MANIFEST_ENTRIES:  # before a block is moved: no DONE could name them all
            self._refuse("required", f"at most {MAX_MANIFEST_ENTRIES} units", f"{num_units} units")
        else:
            self._admit(fetch)

    def _admit(self, fetch: Fetch) -> None:
        self._decide(Kind.ADMIT)
        self._fetch = fetch
        self._lease_end = self._now + LEASE_S
        keys = [(entry.group, ordinal) for entry in fetch.required for ordinal in entry.ordinals]
        self._outbox = Outbox(keys, self._offer.unit_nbytes, pushes_bytes=self._pushes_bytes)
        self._do(AskPin())
        self._send(Accepted(self._header(), 0))

    def _refuse(self, name: str, ours: str, theirs: str) -> None:
        ends = self.ends
        self._send(Refused(name, ours, theirs, transfer_id=ends.transfer_id, epoch=ends.epoch))

    # --- computing and announcing ---------------------------------------------------------------------------

    def _on_units_final(self, event: UnitsFinal) -> None:
        if self.state is State.SENDING and event.compute_id == self._pinned:
            self._outbox.add(event.units)
            self._announce()
        elif self._is_soft:
            self._computation(event.compute_id).units.extend(event.units)

    def _on_prompt_computed(self, event: PromptComputed) -> None:
        if self.state is State.SENDING and event.compute_id == self._pinned:
            self._first_token = event.first_token
            self._try_done()
        elif self._is_soft:
            self._computation(event.compute_id).first_token = event.first_token

    def _on_soft_dropped(self, event: SoftDropped) -> None:
        self._computations.pop(event.compute_id, None)

    def _on_pinned(self, event: Pinned) -> None:
        if self.state is not State.SENDING:
            return
        self._pinned = event.compute_id
        computation = self._computation(event.compute_id)
        self._computations = {}
        self._first_token = computation.first_token
        self._outbox.add(computation.units)
        self._announce()
        self._try_done()

    def _announce(self) -> None:
        numbers = self._outbox.cut()
        for number in numbers:
            self._send_slice(number)
            if self._pushes_bytes:
                units = self._outbox.slice_units(number)
                self._do(SendPayload(number, tuple((u.group, u.ordinal, u.slot, u.generation) for u in units)))
        if numbers and self._slice_repeat.at is None:
            self._slice_repeat.start(self._now)

    def _send_slice(self, number: int) -> None:
        self._send(Slice(self._header(), number, unit_runs(self._outbox.slice_units(number), not self._pushes_bytes)))

    def _on_received(self, message: Received) -> None:
        if self._was in (State.STOPPED, State.CLOSED):
            self._repeat_last_word()
            return
        if not self._outbox.acknowledge(message.number):
            return
        self._slice_repeat.stop()
        if self._outbox.unanswered:
            self._slice_repeat.start(self._now)
        if self.state is State.SENDING:
            self._announce()
            self._try_done()

    def _try_done(self) -> None:
        """The prompt is computed: say DONE once everything is announced, or fail if something never will be."""
        if self._first_token is None:
            return
        if self._outbox.is_all_announced:
            self._decide(Kind.ALL_ANNOUNCED)
            self._insist(self._sealed_done())
        elif self._outbox.missing:
            self._decide(Kind.INCOMPLETE)
            units = tuple(UnitName(group, ordinal) for group, ordinal in self._outbox.missing)
            self._stop(Failed(self._header(), reasons.INCOMPLETE, units), reasons.FAILED)

    def _sealed_done(self) -> Done:
        part = self._offer.part
        return seal(
            self._offer.keys.manifest_mac,
            self._header(),
            rank=part.rank,
            num_ranks=part.num_ranks,
            num_slices=self._outbox.num_slices,
            manifest=tuple(
                ManifestEntry(u.group, u.ordinal, rectangle, u.digest)
                for u in self._outbox.announced
                if (rectangle := part.rectangles[u.group]) is not None
            ),
            first_token=self._first_token if part.rank == 0 else None,
        )

    # --- endings --------------------------------------------------------------------------------------------

    def _on_ack(self, message: Ack) -> None:
        self.last_word = Closed(self._header())
        self._send(self.last_word)
        self._release("acked")

    def _on_cancel(self, message: Cancel) -> None:
        """CANCELLED when it is this end's terminal word; once another was said, or after the end, CLOSED."""
        is_first_word = self._was in (State.WAITING, State.PINNING, State.SENDING)
        header = self._header()
        self.last_word = Cancelled(header, message.reason) if is_first_word else Closed(header)
        self._send(self.last_word)
        if self._was in (State.SENDING, State.DECIDED) and message.reason in (reasons.DIGEST, reasons.NON_FINITE):
            announced = {(unit.group, unit.ordinal) for unit in self._outbox.announced}
            self._do(UnregisterUnits(tuple(u for u in message.units if (u.group, u.ordinal) in announced)))
        self._release(reasons.CANCELLED)

    def _on_cancel_asked(self, event: CancelAsked) -> None:
        self._stop(Cancelled(self._header(), event.reason), reasons.CANCELLED)

    def _on_finished_early(self, event: FinishedEarly) -> None:
        self._stop(Cancelled(self._header(), reasons.FINISHED), reasons.FINISHED)

    def _on_compute_failed(self, event: ComputeFailed) -> None:
        self._stop(Failed(self._header(), event.reason), reasons.FAILED)

    def _on_peer_gone(self, event: PeerGone) -> None:
        self._release(reasons.LOST)

    def _on_lease_renewed(self, event: LeaseRenewed) -> None:
        if self._lease_end is not None:
            self._lease_end = self._now + LEASE_S

    def _on_tick(self, event: Tick) -> None:
        if self.state is State.CLOSED:
            return
        if self._now >= min(at for at in self._limits() if at is not None):
            self._overdue()
            return
        if self._slice_repeat.take(self._now):
            for number in self._outbox.unanswered:
                self._send_slice(number)
        if self._repeat.take(self._now):
            self._repeat_last_word()

    def _overdue(self) -> None:
        is_deadline = self._now >= self.deadline
        self._decide(Kind.OVERDUE)
        word = Failed(self._header(), reasons.DEADLINE if is_deadline else reasons.LEASE)
        self._stop(word, reasons.DEADLINE if is_deadline else reasons.LOST)

    def _stop(self, word: Failed | Cancelled, release: str) -> None:
        """End with `word`, unless the terminal word was said before: then a peer that still asks is told CLOSED."""
        if self._is_released:
            return
        if self._was is State.DECIDED:
            self.last_word = Closed(word.header)
        elif self.state is State.CLOSED:
            self.last_word = word
        else:
            self._insist(word)
            self._give_up_later()
        self._slice_repeat.stop()
        self._lease_end = None
        self._release(release)

    def _release(self, reason: str) -> None:
        if not self._is_released:
            self._is_released = True
            self._do(ReleaseSource(reason))

    # --- facts ----------------------------------------------------------------------------------------------

    @property
    def _is_soft(self) -> bool:
        return self.state in (State.WAITING, State.PINNING)

    @property
    def _pushes_bytes(self) -> bool:
        return self._fetch is not None and self._offer.planes[self._fetch.plane]

    def _computation(self, compute_id: int) -> _Computation:
        return self._computations.setdefault(compute_id, _Computation())

    def _limits(self) -> tuple[float | None, ...]:
        """When to give up: on the peer's answer once released, before that on the request and on its lease."""
        return (self._give_up_at,) if self._is_released else (self.deadline, self._lease_end)

    def _alarms(self) -> tuple[float | None, ...]:
        if self.state is State.CLOSED:
            return ()
        return (*self._limits(), self._repeat.at, self._slice_repeat.at)


def unit_runs(units: tuple[Unit, ...], with_slots: bool) -> tuple[UnitRun, ...]:
    """Units in slice order as runs of consecutive ordinals of one group; slots and generations where they are read."""
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and (unit.group, unit.ordinal) == (runs[-1][-1].group, runs[-1][-1].ordinal + 1):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return tuple(_run(run, with_slots) for run in runs)


def _run(units: list[Unit], with_slots: bool) -> UnitRun:
    slots = tuple(u.slot for u in units) if with_slots else ()
    generations = tuple(u.generation for u in units) if with_slots else ()
    return UnitRun(units[0].group, units[0].ordinal, len(units), slots, generations)
