"""The states of a transfer and every legal step between them: one table for both roles.

Theory of operation
-------------------
One (transfer, epoch) has two ends. The *sender* (prefill) owns the sources, the *receiver* (decode) the destinations;
each keeps its own state, and neither ever needs to know the other's. Three rules:

1. Everything that decides what is legal is in this file. `sender.py` and `receiver.py` say what to do on a legal step.
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

CLOSED: nothing is owed. Sources were released exactly once, and the receiver gave exactly one verdict.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from disagg.transceiver.protocol import events
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages import peer


class Role(Enum):
    SENDER = "sender"
    RECEIVER = "receiver"


class State(Enum):
    WAITING = "waiting"
    PINNING = "pinning"
    SENDING = "sending"
    DECIDED = "decided"
    STOPPED = "stopped"
    FETCHING = "fetching"
    LANDING = "landing"
    VERIFIED = "verified"
    STOPPING = "stopping"
    JOINING = "joining"
    CANCELLING = "cancelling"
    CLOSED = "closed"


class Kind(Enum):
    # messages
    FETCH = "FETCH"
    ACCEPTED = "ACCEPTED"
    SLICE = "SLICE"
    RECEIVED = "RECEIVED"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    ACK = "ACK"
    CANCEL = "CANCEL"
    CLOSED = "CLOSED"
    REFUSED = "REFUSED"
    # events of this process
    CANCEL_ASKED = "CancelAsked"
    PEER_GONE = "PeerGone"
    TICK = "Tick"
    LEASE_RENEWED = "LeaseRenewed"
    PINNED = "Pinned"
    UNITS_FINAL = "UnitsFinal"
    SOFT_DROPPED = "SoftDropped"
    PROMPT_COMPUTED = "PromptComputed"
    FINISHED_EARLY = "FinishedEarly"
    COMPUTE_FAILED = "ComputeFailed"
    RESERVED = "Reserved"
    SLICE_LANDED = "SliceLanded"
    LANDING_FAILED = "LandingFailed"
    LANDING_STOPPED = "LandingStopped"
    # decisions
    ADMIT = "fetch admitted"
    ALL_ANNOUNCED = "all announced"
    INCOMPLETE = "unit missing"
    COVERED = "all verified"
    FAULT = "fault found"
    OVERDUE = "time is over"


K, S = Kind, State

KIND_OF: Final[dict[type, Kind]] = {
    peer.Fetch: K.FETCH,
    peer.Accepted: K.ACCEPTED,
    peer.Slice: K.SLICE,
    peer.Received: K.RECEIVED,
    peer.Done: K.DONE,
    peer.Failed: K.FAILED,
    peer.Cancelled: K.CANCELLED,
    peer.Ack: K.ACK,
    peer.Cancel: K.CANCEL,
    peer.Closed: K.CLOSED,
    peer.Refused: K.REFUSED,
    events.CancelAsked: K.CANCEL_ASKED,
    events.PeerGone: K.PEER_GONE,
    events.Tick: K.TICK,
    events.LeaseRenewed: K.LEASE_RENEWED,
    events.Pinned: K.PINNED,
    events.UnitsFinal: K.UNITS_FINAL,
    events.SoftDropped: K.SOFT_DROPPED,
    events.PromptComputed: K.PROMPT_COMPUTED,
    events.FinishedEarly: K.FINISHED_EARLY,
    events.ComputeFailed: K.COMPUTE_FAILED,
    events.Reserved: K.RESERVED,
    events.SliceLanded: K.SLICE_LANDED,
    events.LandingFailed: K.LANDING_FAILED,
    events.LandingStopped: K.LANDING_STOPPED,
}

MESSAGES: Final = frozenset(K(kind) for cls, kind in KIND_OF.items() if cls.__module__ == peer.__name__)
DECISIONS: Final = frozenset({K.ADMIT, K.ALL_ANNOUNCED, K.INCOMPLETE, K.COVERED, K.FAULT, K.OVERDUE})


def _all_to(state: State, *kinds: Kind) -> dict[Kind, State]:
    return dict.fromkeys(kinds, state)


# What the engine may still say of a request that was released: it has not read the release yet.
_ENGINE = (K.PINNED, K.UNITS_FINAL, K.SOFT_DROPPED, K.PROMPT_COMPUTED, K.FINISHED_EARLY, K.COMPUTE_FAILED)
_ANSWERS = (K.ACCEPTED, K.SLICE, K.DONE, K.FAILED, K.REFUSED)

TRANSITIONS: Final[dict[Role, dict[State, dict[Kind, State]]]] = {
    Role.SENDER: {
        S.WAITING: {
            **_all_to(S.WAITING, K.FETCH, K.UNITS_FINAL, K.SOFT_DROPPED, K.PROMPT_COMPUTED, K.LEASE_RENEWED, K.TICK),
            K.ADMIT: S.PINNING,
            # No FETCH came yet, so no peer is told: the tombstone answers the FETCH when it comes.
            **_all_to(S.CLOSED, K.FINISHED_EARLY, K.COMPUTE_FAILED, K.CANCEL_ASKED, K.OVERDUE, K.CANCEL, K.PEER_GONE),
        },
        S.PINNING: {
            **_all_to(S.PINNING, K.FETCH, K.UNITS_FINAL, K.SOFT_DROPPED, K.PROMPT_COMPUTED, K.LEASE_RENEWED, K.TICK),
            K.PINNED: S.SENDING,
            **_all_to(S.STOPPED, K.FINISHED_EARLY, K.COMPUTE_FAILED, K.CANCEL_ASKED, K.OVERDUE),
            **_all_to(S.CLOSED, K.CANCEL, K.PEER_GONE),
        },
        S.SENDING: {
            **_all_to(S.SENDING, K.FETCH, K.UNITS_FINAL, K.PROMPT_COMPUTED, K.RECEIVED, K.LEASE_RENEWED, K.TICK),
            K.ALL_ANNOUNCED: S.DECIDED,
            **_all_to(S.STOPPED, K.FINISHED_EARLY, K.COMPUTE_FAILED, K.INCOMPLETE, K.CANCEL_ASKED, K.OVERDUE),
            **_all_to(S.CLOSED, K.CANCEL, K.PEER_GONE),
        },
        S.DECIDED: {
            **_all_to(S.DECIDED, K.FETCH, K.RECEIVED, K.LEASE_RENEWED, K.TICK),
            **_all_to(S.CLOSED, K.ACK, K.CANCEL, K.CANCEL_ASKED, K.OVERDUE, K.PEER_GONE),
        },
        S.STOPPED: {
            **_all_to(S.STOPPED, K.FETCH, K.RECEIVED, K.LEASE_RENEWED, K.TICK, K.CANCEL_ASKED, *_ENGINE),
            **_all_to(S.CLOSED, K.ACK, K.CANCEL, K.OVERDUE, K.PEER_GONE),
        },
        S.CLOSED: {
            **_all_to(S.CLOSED, K.FETCH, K.RECEIVED, K.ACK, K.CANCEL, K.LEASE_RENEWED),
            **_all_to(S.CLOSED, K.TICK, K.CANCEL_ASKED, K.PEER_GONE, *_ENGINE),
        },
    },
    Role.RECEIVER: {
        S.WAITING: {
            K.RESERVED: S.FETCHING,
            K.TICK: S.WAITING,
            # Nothing was asked of the peer and no job can hold a slot: there is nothing to stop.
            **_all_to(S.CLOSED, K.CANCEL_ASKED, K.OVERDUE, K.PEER_GONE),
        },
        S.FETCHING: {
            K.TICK: S.FETCHING,
            **_all_to(S.LANDING, K.ACCEPTED, K.SLICE, K.DONE),
            **_all_to(S.STOPPING, K.FAILED, K.CANCELLED, K.REFUSED, K.CANCEL_ASKED, K.OVERDUE),
            **_all_to(S.JOINING, K.CLOSED, K.PEER_GONE),
        },
        S.LANDING: {
            **_all_to(S.LANDING, K.ACCEPTED, K.SLICE, K.DONE, K.SLICE_LANDED, K.TICK),
            K.COVERED: S.VERIFIED,
            **_all_to(S.STOPPING, K.FAULT, K.LANDING_FAILED, K.CANCEL_ASKED, K.OVERDUE),
            **_all_to(S.STOPPING, K.FAILED, K.CANCELLED, K.REFUSED),
            **_all_to(S.JOINING, K.CLOSED, K.PEER_GONE),
        },
        S.VERIFIED: {
            **_all_to(S.VERIFIED, K.TICK, K.CANCEL_ASKED, *_ANSWERS),
            **_all_to(S.CLOSED, K.CLOSED, K.CANCELLED, K.OVERDUE, K.PEER_GONE),
        },
        S.STOPPING: {
            **_all_to(S.STOPPING, K.TICK, K.CANCEL_ASKED, K.SLICE_LANDED, K.LANDING_FAILED, *_ANSWERS),
            K.LANDING_STOPPED: S.CANCELLING,
            **_all_to(S.JOINING, K.CLOSED, K.CANCELLED, K.OVERDUE, K.PEER_GONE),
        },
        S.JOINING: {
            **_all_to(S.JOINING, K.TICK, K.CANCEL_ASKED, K.SLICE_LANDED, K.LANDING_FAILED, *_ANSWERS),
            **_all_to(S.JOINING, K.CLOSED, K.CANCELLED, K.PEER_GONE),
            K.LANDING_STOPPED: S.CLOSED,
        },
        S.CANCELLING: {
            **_all_to(S.CANCELLING, K.TICK, K.CANCEL_ASKED, *_ANSWERS),
            **_all_to(S.CLOSED, K.CLOSED, K.CANCELLED, K.OVERDUE, K.PEER_GONE),
        },
        S.CLOSED: {
            # RESERVED: the engine had made room before it read that the request was over.
            **_all_to(S.CLOSED, K.TICK, K.CANCEL_ASKED, K.RESERVED, *_ANSWERS),
            **_all_to(S.CLOSED, K.CLOSED, K.CANCELLED, K.PEER_GONE),
        },
    },
}


def kind_of(event: events.Event) -> Kind:
    """The kind of an event, of a message that arrived its own. Raises `LocalProtocolError` for a stranger."""
    subject = event.message if isinstance(event, events.MessageArrived) else event
    kind = KIND_OF.get(type(subject))
    if kind is None:
        raise LocalProtocolError(f"{type(subject).__name__} is no event of a transfer")
    return kind


def next_state(role: Role, state: State, kind: Kind) -> State:
    """The state after `kind`. Raises `RemoteProtocolError` (a message) or `LocalProtocolError` when it is not legal."""
    target = TRANSITIONS[role][state].get(kind)
    if target is None:
        error = RemoteProtocolError if kind in MESSAGES else LocalProtocolError
        raise error(f"{kind.value} is not legal for a {role.value} in state `{state.value}`")
    return target
