"""A pair brought into any state of either role, one event of every kind, and a picture of all a side remembers."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from support.links.move_pair import (
    BOUNDARY,
    FIRST_INDEX,
    FROZEN,
    KNOWN,
    LOGPROBS,
    OUTPUT,
    MovePair,
    frozen_units,
    make_move_source,
    move_ticket,
    room_for_all,
    room_made,
)
from support.links.transfer_pair import (
    COMPUTE_ID,
    DECODE,
    FIRST,
    PREFILL,
    TRANSFER_ID,
    TransferPair,
    make_reserved,
    make_sender,
    make_ticket,
    needed_of,
)
from support.links.unchecked import raw

from disagg.transceiver.protocol import events as e
from disagg.transceiver.protocol.actions import Send, StopLanding
from disagg.transceiver.protocol.move_source import FROZEN_ID
from disagg.transceiver.protocol.state import Kind, Role, State
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import MOVE


class _Stuck:
    """Nothing arrives and no job is joined unless a test does it: each end stays where it is put."""

    def post(self, target: Transfer, data: bytes) -> None:
        self.last_sent = data

    def _perform(self, end: Transfer, action: Any) -> None:
        if isinstance(action, StopLanding):
            self.jobs.clear()  # type: ignore[attr-defined]  # of the pair that this is mixed into
        else:
            super()._perform(end, action)  # type: ignore[misc]


class StuckPair(_Stuck, TransferPair):
    """Of a handoff."""


class StuckMove(_Stuck, MovePair):
    """Of a move."""


SOURCES = (Role.SENDER, Role.MOVE_SOURCE)
MOVES = (Role.MOVE_SOURCE, Role.MOVE_SINK)


def header(to: Role, sequence: int = 1) -> p.Header:
    source, destination = (DECODE, PREFILL) if to in SOURCES else (PREFILL, DECODE)
    return p.Header(source, destination, TRANSFER_ID, 0, sequence)


def fetch(**changes: Any) -> p.Fetch:
    fields = {"ticket": make_ticket(), "prompt_len": 26, "required": make_reserved().required, "plane": "shm"}
    return raw(p.Fetch, header(Role.SENDER), **(fields | changes))


def fetch_of_move() -> p.Fetch:
    return p.Fetch(header(Role.MOVE_SOURCE), move_ticket(), KNOWN, (), "shm", MOVE)


def accepted_of_move() -> p.Accepted:
    answer = {"output": OUTPUT[FIRST_INDEX:], "logprobs": LOGPROBS}
    return p.Accepted(header(Role.MOVE_SINK), 0, BOUNDARY, **answer)  # type: ignore[arg-type]


def arrived(message: Any) -> e.MessageArrived:
    return e.MessageArrived(message)


def slice_message(number: int = 0, required: tuple[GroupRuns, ...] | None = None) -> p.Slice:
    """A slice of all that was reserved, as an honest sender might cut it."""
    required = make_reserved().required if required is None else required
    runs = [p.UnitRun(entry.group, first, count) for entry in required for first, count in entry.runs]
    return p.Slice(header(Role.RECEIVER), number, tuple(runs))


def landed(message: p.Slice, pair: TransferPair) -> e.SliceLanded:
    units = [(run.group, run.first + i) for run in message.units for i in range(run.count)]
    return e.SliceLanded(message.number, tuple(e.LandedUnit(g, o, pair.landed_digest(g, o)) for g, o in units))


def honest_done() -> p.Done:
    """DONE of a sender that ran to the end of the prompt with one slice."""
    sender = make_sender(unit_nbytes=(1, 1))
    sender.handle(arrived(fetch()), 0.0)
    sender.handle(e.UnitsFinal(COMPUTE_ID, needed_of()), 0.0)
    sender.handle(e.Pinned(COMPUTE_ID), 0.0)
    (action,) = sender.handle(e.PromptComputed(COMPUTE_ID, FIRST), 0.0)
    assert isinstance(action, Send)
    assert isinstance(action.message, p.Done)
    return action.message


def honest_done_of_move() -> p.Done:
    """DONE of a source that sent all in one slice."""
    source = make_move_source(unit_nbytes=(1, 1))
    for event in (arrived(fetch_of_move()), FROZEN, e.UnitsFinal(FROZEN_ID, frozen_units())):
        source.handle(event, 0.0)
    actions = source.handle(arrived(p.Received(header(Role.MOVE_SOURCE), -1)), 0.0)
    (done,) = (a.message for a in actions if isinstance(a, Send) and isinstance(a.message, p.Done))
    return done


def sample_event(kind: Kind, role: Role, pair: TransferPair) -> e.Event:
    """An event of `kind` that is right in itself."""
    to = header(role)
    samples: dict[Kind, Callable[[], Any]] = {
        p.Fetch: lambda: arrived(fetch()),
        p.Accepted: lambda: arrived(p.Accepted(to, 0)),
        p.Slice: lambda: arrived(slice_message()),
        p.Received: lambda: arrived(p.Received(to, -1)),
        p.Done: lambda: arrived(honest_done()),
        p.Failed: lambda: arrived(p.Failed(to, "failed")),
        p.Cancelled: lambda: arrived(p.Cancelled(to, "cancelled")),
        p.Ack: lambda: arrived(p.Ack(to)),
        p.Cancel: lambda: arrived(p.Cancel(to, "cancelled")),
        p.Closed: lambda: arrived(p.Closed(to)),
        p.Refused: lambda: arrived(p.Refused("ticket", "a", "b", transfer_id=TRANSFER_ID)),
        e.CancelAsked: lambda: e.CancelAsked("cancelled"),
        e.PeerGone: lambda: e.PeerGone("end of file"),
        e.Tick: e.Tick,
        e.LeaseRenewed: e.LeaseRenewed,
        e.Pinned: lambda: e.Pinned(COMPUTE_ID),
        e.UnitsFinal: lambda: e.UnitsFinal(COMPUTE_ID, needed_of()),
        e.SoftDropped: lambda: e.SoftDropped(COMPUTE_ID - 1),
        e.PromptComputed: lambda: e.PromptComputed(COMPUTE_ID - 1, FIRST),
        e.FinishedEarly: lambda: e.FinishedEarly(COMPUTE_ID),
        e.ComputeFailed: lambda: e.ComputeFailed("non-finite"),
        e.FetchWanted: e.FetchWanted,
        e.Reserved: make_reserved,
        e.SliceLanded: lambda: landed(slice_message(), pair),
        e.LandingFailed: lambda: e.LandingFailed(0, "source changed"),
        e.LandingStopped: e.LandingStopped,
        e.Frozen: lambda: FROZEN,
        e.RoomMade: room_made,
        e.Extended: room_for_all,
        e.RoomRefused: lambda: e.RoomRefused("no_room"),
    }
    if role in MOVES:
        whole = slice_message(0, room_for_all().required)
        samples |= {
            p.Fetch: lambda: arrived(fetch_of_move()),
            p.Accepted: lambda: arrived(accepted_of_move()),
            p.Slice: lambda: arrived(whole),
            p.Done: lambda: arrived(honest_done_of_move()),
            e.UnitsFinal: lambda: e.UnitsFinal(FROZEN_ID, frozen_units()),
            e.SliceLanded: lambda: landed(whole, pair),
        }
    return samples[kind]()


_LANDS = (e.RoomMade, p.Accepted, e.Extended)

_PATHS: dict[tuple[Role, State], tuple[Kind, ...]] = {
    (Role.SENDER, State.WAITING): (),
    (Role.SENDER, State.PINNING): (p.Fetch,),
    (Role.SENDER, State.SENDING): (p.Fetch, e.Pinned),
    (Role.SENDER, State.DECIDED): (p.Fetch, e.UnitsFinal, e.Pinned, e.PromptComputed),
    (Role.SENDER, State.STOPPED): (p.Fetch, e.ComputeFailed),
    (Role.SENDER, State.CLOSED): (p.Fetch, p.Cancel),
    (Role.RECEIVER, State.WAITING): (),
    (Role.RECEIVER, State.FETCHING): (e.Reserved,),
    (Role.RECEIVER, State.LANDING): (e.Reserved, p.Slice),
    (Role.RECEIVER, State.VERIFIED): (e.Reserved, p.Slice, e.SliceLanded, p.Done),
    (Role.RECEIVER, State.STOPPING): (e.Reserved, p.Slice, e.CancelAsked),
    (Role.RECEIVER, State.JOINING): (e.Reserved, p.Slice, e.PeerGone),
    (Role.RECEIVER, State.CANCELLING): (e.Reserved, e.CancelAsked, e.LandingStopped),
    (Role.RECEIVER, State.CLOSED): (e.CancelAsked,),
    (Role.MOVE_SOURCE, State.WAITING): (),
    (Role.MOVE_SOURCE, State.PINNING): (p.Fetch,),
    (Role.MOVE_SOURCE, State.SENDING): (p.Fetch, e.Frozen),
    (Role.MOVE_SOURCE, State.DECIDED): (p.Fetch, e.Frozen, e.UnitsFinal, p.Received),
    (Role.MOVE_SOURCE, State.STOPPED): (p.Fetch, e.ComputeFailed),
    (Role.MOVE_SOURCE, State.CLOSED): (p.Fetch, p.Cancel),
    (Role.MOVE_SINK, State.WAITING): (),
    (Role.MOVE_SINK, State.FETCHING): (e.RoomMade,),
    (Role.MOVE_SINK, State.EXTENDING): (e.RoomMade, p.Accepted),
    (Role.MOVE_SINK, State.LANDING): (*_LANDS, p.Slice),
    (Role.MOVE_SINK, State.VERIFIED): (*_LANDS, p.Slice, e.SliceLanded, p.Done),
    (Role.MOVE_SINK, State.STOPPING): (*_LANDS, p.Slice, e.CancelAsked),
    (Role.MOVE_SINK, State.JOINING): (*_LANDS, p.Slice, e.PeerGone),
    (Role.MOVE_SINK, State.CANCELLING): (e.RoomMade, e.CancelAsked, e.LandingStopped),
    (Role.MOVE_SINK, State.CLOSED): (e.CancelAsked,),
}


def reach(role: Role, state: State) -> tuple[TransferPair, Transfer]:
    """A fresh end of `role` in `state`, at time 0."""
    pair = StuckMove(freezes=False, extends=False) if role in MOVES else StuckPair()
    end = pair.sender if role in SOURCES else pair.receiver
    for kind in _PATHS[role, state]:
        event = sample_event(kind, role, pair)
        if isinstance(event, e.PromptComputed):
            event = e.PromptComputed(COMPUTE_ID, FIRST)
        pair.feed(end, event)
    assert end.state is state, (end.state, state)
    return pair, end


def picture(thing: Any) -> Any:
    """Everything reachable from `thing`, as plain values that compare."""
    if isinstance(thing, dict):
        return {repr(key): picture(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [picture(value) for value in thing]
    if isinstance(thing, Enum) or not type(thing).__module__.startswith("disagg"):
        return repr(thing) if not isinstance(thing, set | frozenset) else sorted(map(repr, thing))
    if not hasattr(thing, "__dict__"):
        return repr(thing)
    return {key: picture(value) for key, value in vars(thing).items() if not callable(value)}
