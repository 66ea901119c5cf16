"""The states of a transfer and every legal step between them: one table for both roles.

Theory of operation
-------------------
One (transfer, epoch) has two ends. The *sender* (prefill) owns the sources, the *receiver* (decode) the destinations;
each keeps its own state, and neither ever needs to know the other's. Three rules:

1. Everything that decides what is legal is in this file. What to do on a legal step is a table with the same keys in
   `sender.py` and in `receiver.py`: no code there asks again which state it was.
2. This file does not know time, bytes or peers. What depends on those is judged elsewhere and comes back as a
   *decision*, a kind of its own in the table: FETCH leaves the sender where it is, and ADMIT, which follows when ticket
   and ordinals are right, moves it. So a target never depends on anything but (role, state, kind).
3. A pair that is not in the table raises and changes nothing: `RemoteProtocolError` when a peer's message caused it,
   `LocalProtocolError` when this process did.

Delivery is at least once and in any order, so late repeats of everything a peer may say are legal in every later state;
what is illegal is what no order of delivery explains, such as ACK before DONE was said.

Sender. WAITING: the prompt is being computed, no FETCH came; blocks are soft. PINNING: a FETCH was admitted and
the engine has been asked to hold the blocks. SENDING: they are held; slices go out as units become final. DECIDED: DONE
was said. STOPPED: FAILED or CANCELLED was said and the sources are already free. One of these words is said per epoch
and is final, so a sender that has said DONE and must let go anyway (lease, deadline, the router) says nothing more:
a peer that asks it afterwards is told CLOSED.

Receiver. WAITING: no destinations yet. FETCHING: FETCH repeats. LANDING: the sender has answered. VERIFIED: the
licence to decode was given; ACK repeats. A failure has two tails that end independently: landing jobs must be joined,
because only then may a slot be reused, and CANCEL must be answered, because it frees the peer's sources. STOPPING waits
for both, JOINING for the jobs, CANCELLING for the answer. The failure is reported when the jobs are joined, not later.

Moves. The source's states are a sender's, with other events: PINNING lasts until the answer stands still, and in
SENDING nothing leaves before RECEIVED has said that the sink has room. The sink is a receiver that is EXTENDING between
ACCEPTED, which says how long the answer has become, and the room for that.

CLOSED: nothing is owed. Sources were released exactly once, and the receiver gave exactly one verdict.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, get_args

from disagg.transceiver.protocol.events import (
    CancelAsked,
    ComputeFailed,
    Event,
    Extended,
    FetchWanted,
    FinishedEarly,
    Frozen,
    LandingFailed,
    LandingStopped,
    LeaseRenewed,
    MessageArrived,
    PeerGone,
    Pinned,
    PromptComputed,
    Reserved,
    RoomMade,
    RoomRefused,
    SliceLanded,
    SoftDropped,
    Tick,
    UnitsFinal,
)
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
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
    TransferMessage,
)


class Role(Enum):
    SENDER = "sender"
    RECEIVER = "receiver"
    MOVE_SOURCE = "source of a move"
    MOVE_SINK = "sink of a move"


class State(Enum):
    WAITING = "waiting"
    PINNING = "pinning"
    SENDING = "sending"
    DECIDED = "decided"
    STOPPED = "stopped"
    FETCHING = "fetching"
    EXTENDING = "extending"
    LANDING = "landing"
    VERIFIED = "verified"
    STOPPING = "stopping"
    JOINING = "joining"
    CANCELLING = "cancelling"
    CLOSED = "closed"


class Decision(Enum):
    """What depends on time, content or a peer's words, once it has been judged."""

    ADMIT = "fetch admitted"
    ALL_ANNOUNCED = "all announced"
    INCOMPLETE = "unit missing"
    COVERED = "all verified"
    FAULT = "fault found"
    OVERDUE = "time is over"


Kind = type | Decision
"""A key of the table: the class of an event, the class of a message that arrived, or a decision."""

MESSAGES: Final[frozenset[type]] = frozenset({*get_args(TransferMessage), Refused})
EVENTS: Final[frozenset[type]] = frozenset(get_args(Event)) - {MessageArrived}

D, S = Decision, State


def _all_to(state: State, *kinds: Kind) -> dict[Kind, State]:
    return dict.fromkeys(kinds, state)


# What the engine may still say of a request that was released: it has not read the release yet.
_ENGINE = (Pinned, UnitsFinal, SoftDropped, PromptComputed, FinishedEarly, ComputeFailed)
_MOVED = (Frozen, UnitsFinal, FinishedEarly, ComputeFailed)
_ROOM = (Extended, RoomRefused)
_ANSWERS = (Accepted, Slice, Done, Failed, Refused)


def _end_of_source(late: tuple[Kind, ...]) -> dict[State, dict[Kind, State]]:
    """From the decision on. `late`: what its engine may still say."""
    return {
        S.DECIDED: {
            **_all_to(S.DECIDED, Fetch, Received, LeaseRenewed, Tick),
            **_all_to(S.CLOSED, Ack, Cancel, CancelAsked, D.OVERDUE, PeerGone),
        },
        S.STOPPED: {
            **_all_to(S.STOPPED, Fetch, Received, LeaseRenewed, Tick, CancelAsked, *late),
            **_all_to(S.CLOSED, Ack, Cancel, D.OVERDUE, PeerGone),
        },
        S.CLOSED: {
            **_all_to(S.CLOSED, Fetch, Received, Ack, Cancel, LeaseRenewed),
            **_all_to(S.CLOSED, Tick, CancelAsked, PeerGone, *late),
        },
    }


def _end_of_sink(late: tuple[Kind, ...], latest: tuple[Kind, ...]) -> dict[State, dict[Kind, State]]:
    """From the verdict on. `late`: what its engine may still say; `latest`: once all is over too.

    The engine had made room before it read that the request was over.
    """
    return {
        S.VERIFIED: {
            **_all_to(S.VERIFIED, Tick, CancelAsked, *_ANSWERS),
            **_all_to(S.CLOSED, Closed, Cancelled, D.OVERDUE, PeerGone),
        },
        S.STOPPING: {
            **_all_to(S.STOPPING, Tick, CancelAsked, SliceLanded, LandingFailed, *_ANSWERS, *late),
            LandingStopped: S.CANCELLING,
            **_all_to(S.JOINING, Closed, Cancelled, D.OVERDUE, PeerGone),
        },
        S.JOINING: {
            **_all_to(S.JOINING, Tick, CancelAsked, SliceLanded, LandingFailed, *_ANSWERS, *late),
            **_all_to(S.JOINING, Closed, Cancelled, PeerGone),
            LandingStopped: S.CLOSED,
        },
        S.CANCELLING: {
            **_all_to(S.CANCELLING, Tick, CancelAsked, *_ANSWERS, *late),
            **_all_to(S.CLOSED, Closed, Cancelled, D.OVERDUE, PeerGone),
        },
        S.CLOSED: {
            **_all_to(S.CLOSED, Tick, CancelAsked, *_ANSWERS, *latest),
            **_all_to(S.CLOSED, Closed, Cancelled, PeerGone),
        },
    }


TRANSITIONS: Final[dict[Role, dict[State, dict[Kind, State]]]] = {
    Role.SENDER: {
        S.WAITING: {
            **_all_to(S.WAITING, Fetch, UnitsFinal, SoftDropped, PromptComputed, LeaseRenewed, Tick),
            D.ADMIT: S.PINNING,
            # No FETCH came yet, so no peer is told: the tombstone answers the FETCH when it comes.
            **_all_to(S.CLOSED, FinishedEarly, ComputeFailed, CancelAsked, D.OVERDUE, Cancel, PeerGone),
        },
        S.PINNING: {
            **_all_to(S.PINNING, Fetch, UnitsFinal, SoftDropped, PromptComputed, LeaseRenewed, Tick),
            Pinned: S.SENDING,
            **_all_to(S.STOPPED, FinishedEarly, ComputeFailed, CancelAsked, D.OVERDUE),
            **_all_to(S.CLOSED, Cancel, PeerGone),
        },
        S.SENDING: {
            **_all_to(S.SENDING, Fetch, UnitsFinal, PromptComputed, Received, LeaseRenewed, Tick),
            D.ALL_ANNOUNCED: S.DECIDED,
            **_all_to(S.STOPPED, FinishedEarly, ComputeFailed, D.INCOMPLETE, CancelAsked, D.OVERDUE),
            **_all_to(S.CLOSED, Cancel, PeerGone),
        },
        **_end_of_source(_ENGINE),
    },
    Role.RECEIVER: {
        S.WAITING: {
            **_all_to(S.FETCHING, Reserved, FetchWanted),
            Tick: S.WAITING,
            # Nothing was asked of the peer and no job can hold a slot: there is nothing to stop.
            **_all_to(S.CLOSED, CancelAsked, D.OVERDUE, PeerGone),
        },
        S.FETCHING: {
            Tick: S.FETCHING,
            **_all_to(S.LANDING, Accepted, Slice, Done),
            **_all_to(S.STOPPING, Failed, Cancelled, Refused, CancelAsked, D.OVERDUE),
            **_all_to(S.JOINING, Closed, PeerGone),
        },
        S.LANDING: {
            **_all_to(S.LANDING, Accepted, Reserved, Slice, Done, SliceLanded, Tick),
            D.COVERED: S.VERIFIED,
            **_all_to(S.STOPPING, D.FAULT, LandingFailed, CancelAsked, D.OVERDUE),
            **_all_to(S.STOPPING, Failed, Cancelled, Refused),
            **_all_to(S.JOINING, Closed, PeerGone),
        },
        **_end_of_sink((Reserved,), (Reserved,)),
    },
    Role.MOVE_SOURCE: {
        S.WAITING: {
            **_all_to(S.WAITING, Fetch, LeaseRenewed, Tick),
            D.ADMIT: S.PINNING,
            **_all_to(S.CLOSED, FinishedEarly, ComputeFailed, CancelAsked, D.OVERDUE, Cancel, PeerGone),
        },
        S.PINNING: {
            **_all_to(S.PINNING, Fetch, LeaseRenewed, Tick),
            Frozen: S.SENDING,
            **_all_to(S.STOPPED, FinishedEarly, ComputeFailed, CancelAsked, D.OVERDUE),
            **_all_to(S.CLOSED, Cancel, PeerGone),
        },
        S.SENDING: {
            **_all_to(S.SENDING, Fetch, UnitsFinal, Received, LeaseRenewed, Tick),
            D.ALL_ANNOUNCED: S.DECIDED,
            **_all_to(S.STOPPED, ComputeFailed, CancelAsked, D.OVERDUE),
            **_all_to(S.CLOSED, Cancel, PeerGone),
        },
        **_end_of_source(_MOVED),
    },
    Role.MOVE_SINK: {
        S.WAITING: {
            RoomMade: S.FETCHING,
            Tick: S.WAITING,
            **_all_to(S.CLOSED, CancelAsked, D.OVERDUE, PeerGone),
        },
        S.FETCHING: {
            Tick: S.FETCHING,
            Accepted: S.EXTENDING,
            **_all_to(S.STOPPING, Failed, Cancelled, Refused, CancelAsked, D.OVERDUE),
            **_all_to(S.JOINING, Closed, PeerGone),
        },
        S.EXTENDING: {
            **_all_to(S.EXTENDING, Accepted, Tick),
            Extended: S.LANDING,
            **_all_to(S.STOPPING, D.FAULT, RoomRefused, CancelAsked, D.OVERDUE),
            **_all_to(S.STOPPING, Failed, Cancelled, Refused),
            **_all_to(S.JOINING, Closed, PeerGone),
        },
        S.LANDING: {
            **_all_to(S.LANDING, Accepted, Slice, Done, SliceLanded, Tick),
            D.COVERED: S.VERIFIED,
            **_all_to(S.STOPPING, D.FAULT, LandingFailed, CancelAsked, D.OVERDUE),
            **_all_to(S.STOPPING, Failed, Cancelled, Refused),
            **_all_to(S.JOINING, Closed, PeerGone),
        },
        **_end_of_sink(_ROOM, (RoomMade, *_ROOM)),
    },
}


def next_state(role: Role, state: State, kind: Kind) -> State:
    """The state after `kind`. Raises `RemoteProtocolError` (a message) or `LocalProtocolError` when it is not legal."""
    target = TRANSITIONS[role][state].get(kind)
    if target is not None:
        return target
    if kind not in MESSAGES and kind not in EVENTS and not isinstance(kind, Decision):
        raise LocalProtocolError(f"{name_of(kind)} is no event of a transfer")
    error = RemoteProtocolError if kind in MESSAGES else LocalProtocolError
    raise error(f"{name_of(kind)} is not legal for a {role.value} in state `{state.value}`")


def name_of(kind: Kind) -> str:
    """A message's name is written in capitals, as in `docs/protocol.md`."""
    if isinstance(kind, Decision):
        return kind.value
    return kind.__name__.upper() if kind in MESSAGES else kind.__name__
