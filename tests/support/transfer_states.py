"""A pair brought into any state of either role, one event of every kind, and a picture of all a side remembers."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from support.transfer_pair import (
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
from support.unchecked import raw

from disagg.transceiver.protocol import events as e
from disagg.transceiver.protocol.actions import Send, StopLanding
from disagg.transceiver.protocol.state import Kind, Role, State
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.messages import peer as p


class StuckPair(TransferPair):
    """Nothing arrives and no job is joined unless a test does it: each end stays where it is put."""

    def post(self, target: Transfer, data: bytes) -> None:
        self.last_sent = data

    def _perform(self, end: Transfer, action: Any) -> None:
        if isinstance(action, StopLanding):
            self.jobs.clear()
        else:
            super()._perform(end, action)


def header(to: Role, sequence: int = 1) -> p.Header:
    source, destination = (DECODE, PREFILL) if to is Role.SENDER else (PREFILL, DECODE)
    return p.Header(source, destination, TRANSFER_ID, 0, sequence)


def fetch(**changes: Any) -> p.Fetch:
    fields = {"ticket": make_ticket(), "prompt_len": 26, "required": make_reserved().required, "plane": "shm"}
    return raw(p.Fetch, header(Role.SENDER), **(fields | changes))


def arrived(message: Any) -> e.MessageArrived:
    return e.MessageArrived(message)


def slice_message(number: int = 0) -> p.Slice:
    """A slice of all that was reserved, as an honest sender might cut it."""
    runs = [p.UnitRun(entry.group, first, count) for entry in make_reserved().required for first, count in entry.runs]
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


def sample_event(kind: Kind, role: Role, pair: TransferPair) -> e.Event:
    """An event of `kind` that is right in itself."""
    to = header(role)
    samples: dict[Kind, Callable[[], Any]] = {
        Kind.FETCH: lambda: arrived(fetch()),
        Kind.ACCEPTED: lambda: arrived(p.Accepted(to, 0)),
        Kind.SLICE: lambda: arrived(slice_message()),
        Kind.RECEIVED: lambda: arrived(p.Received(to, -1)),
        Kind.DONE: lambda: arrived(honest_done()),
        Kind.FAILED: lambda: arrived(p.Failed(to, "failed")),
        Kind.CANCELLED: lambda: arrived(p.Cancelled(to, "cancelled")),
        Kind.ACK: lambda: arrived(p.Ack(to)),
        Kind.CANCEL: lambda: arrived(p.Cancel(to, "cancelled")),
        Kind.CLOSED: lambda: arrived(p.Closed(to)),
        Kind.REFUSED: lambda: arrived(p.Refused("ticket", "a", "b", transfer_id=TRANSFER_ID)),
        Kind.CANCEL_ASKED: lambda: e.CancelAsked("cancelled"),
        Kind.PEER_GONE: lambda: e.PeerGone("end of file"),
        Kind.TICK: e.Tick,
        Kind.LEASE_RENEWED: e.LeaseRenewed,
        Kind.PINNED: lambda: e.Pinned(COMPUTE_ID),
        Kind.UNITS_FINAL: lambda: e.UnitsFinal(COMPUTE_ID, needed_of()),
        Kind.SOFT_DROPPED: lambda: e.SoftDropped(COMPUTE_ID - 1),
        Kind.PROMPT_COMPUTED: lambda: e.PromptComputed(COMPUTE_ID - 1, FIRST),
        Kind.FINISHED_EARLY: lambda: e.FinishedEarly(COMPUTE_ID),
        Kind.COMPUTE_FAILED: lambda: e.ComputeFailed("non-finite"),
        Kind.RESERVED: make_reserved,
        Kind.SLICE_LANDED: lambda: landed(slice_message(), pair),
        Kind.LANDING_FAILED: lambda: e.LandingFailed(0, "source changed"),
        Kind.LANDING_STOPPED: e.LandingStopped,
    }
    return samples[kind]()


_PATHS: dict[tuple[Role, State], tuple[Kind, ...]] = {
    (Role.SENDER, State.WAITING): (),
    (Role.SENDER, State.PINNING): (Kind.FETCH,),
    (Role.SENDER, State.SENDING): (Kind.FETCH, Kind.PINNED),
    (Role.SENDER, State.DECIDED): (Kind.FETCH, Kind.UNITS_FINAL, Kind.PINNED, Kind.PROMPT_COMPUTED),
    (Role.SENDER, State.STOPPED): (Kind.FETCH, Kind.COMPUTE_FAILED),
    (Role.SENDER, State.CLOSED): (Kind.FETCH, Kind.CANCEL),
    (Role.RECEIVER, State.WAITING): (),
    (Role.RECEIVER, State.FETCHING): (Kind.RESERVED,),
    (Role.RECEIVER, State.LANDING): (Kind.RESERVED, Kind.SLICE),
    (Role.RECEIVER, State.VERIFIED): (Kind.RESERVED, Kind.SLICE, Kind.SLICE_LANDED, Kind.DONE),
    (Role.RECEIVER, State.STOPPING): (Kind.RESERVED, Kind.SLICE, Kind.CANCEL_ASKED),
    (Role.RECEIVER, State.JOINING): (Kind.RESERVED, Kind.SLICE, Kind.PEER_GONE),
    (Role.RECEIVER, State.CANCELLING): (Kind.RESERVED, Kind.CANCEL_ASKED, Kind.LANDING_STOPPED),
    (Role.RECEIVER, State.CLOSED): (Kind.CANCEL_ASKED,),
}


def reach(role: Role, state: State) -> tuple[StuckPair, Transfer]:
    """A fresh end of `role` in `state`, at time 0."""
    pair = StuckPair()
    end = pair.sender if role is Role.SENDER else pair.receiver
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
