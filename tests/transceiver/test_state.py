from __future__ import annotations

from pathlib import Path

import pytest
from support.links.transfer_pair import make_sender
from support.links.transfer_states import picture, reach, sample_event

from disagg.transceiver.protocol import events
from disagg.transceiver.protocol.diagram import render
from disagg.transceiver.protocol.move_sink import MoveSink
from disagg.transceiver.protocol.move_source import MoveSource
from disagg.transceiver.protocol.prefix_sink import PrefixReceiver
from disagg.transceiver.protocol.prefix_source import PrefixSender
from disagg.transceiver.protocol.receiver import Receiver
from disagg.transceiver.protocol.sender import Sender
from disagg.transceiver.protocol.state import (
    EVENTS,
    MESSAGES,
    TRANSITIONS,
    Decision,
    Kind,
    Role,
    State,
    next_state,
)
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages import peer

ENDS = [Sender, Receiver, MoveSource, MoveSink]
EXTERNAL = sorted(MESSAGES | EVENTS, key=lambda kind: kind.__name__)
OF_PREFIXES = {
    (Role.RECEIVER, State.WAITING, events.FetchWanted),
    (Role.RECEIVER, State.LANDING, events.Reserved),
}
"""Steps of a prefix's sink alone: a handoff has its room before it is fetched (`test_prefix_transfer.py`)."""
PAIRS = [
    (role, state, kind)
    for role in Role
    for state in TRANSITIONS[role]
    for kind in EXTERNAL
    if (role, state, kind) not in OF_PREFIXES
]
ENDS = [Sender, Receiver, PrefixSender, PrefixReceiver]


def name_of(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(getattr(value, "name", value))


def reachable_by_decision(role: Role, state: State) -> set[State]:
    """States that decisions can lead to from `state`, in any number of steps."""
    found = {state}
    for _ in Decision:
        found |= {TRANSITIONS[role][s][kind] for s in found for kind in Decision if kind in TRANSITIONS[role][s]}
    return found


@pytest.mark.parametrize(("role", "state", "kind"), PAIRS, ids=name_of)
def test_every_pair_is_legal_or_raises_and_changes_nothing(role: Role, state: State, kind: Kind) -> None:
    pair, end = reach(role, state)
    before = picture(end)
    event = sample_event(kind, role, pair)
    target = TRANSITIONS[role][state].get(kind)
    if target is None:
        with pytest.raises(RemoteProtocolError if kind in MESSAGES else LocalProtocolError, match="is not legal"):
            end.handle(event, 0.0)
        assert picture(end) == before
    else:
        pair.feed(end, event)
        assert end.state in reachable_by_decision(role, target)
        pair.check_invariants()


@pytest.mark.parametrize("role", Role)
def test_every_state_can_close_and_none_leaves_closed(role: Role) -> None:
    table = TRANSITIONS[role]
    closing = {State.CLOSED}
    for _ in table:
        closing |= {state for state, row in table.items() if closing & set(row.values())}
    assert closing == set(table)
    assert set(table[State.CLOSED].values()) == {State.CLOSED}


@pytest.mark.parametrize("role", Role)
def test_every_state_but_the_first_is_a_target(role: Role) -> None:
    targets = {target for row in TRANSITIONS[role].values() for target in row.values()}
    assert targets | {State.WAITING} == set(TRANSITIONS[role])


@pytest.mark.parametrize("role", Role)
def test_a_lost_peer_is_legal_in_every_state(role: Role) -> None:
    always = {events.PeerGone, events.Tick, events.CancelAsked}
    assert all(always <= set(row) for row in TRANSITIONS[role].values())


def test_every_event_message_and_decision_is_a_key_of_the_table() -> None:
    keys = {kind for table in TRANSITIONS.values() for row in table.values() for kind in row}
    assert keys == {*events.Event.__args__, *peer.TransferMessage.__args__, peer.Refused, *Decision} - {
        events.MessageArrived
    }


@pytest.mark.parametrize("end", ENDS)
def test_an_end_reacts_to_legal_steps_only(end: type[Transfer]) -> None:
    assert set(end.reactions) == set(TRANSITIONS[end.role])
    for state, row in end.reactions.items():
        assert set(row) <= set(TRANSITIONS[end.role][state]), state


@pytest.mark.parametrize("end", ENDS)
def test_an_end_reacts_to_every_step_that_moves_it_from_an_open_exchange(end: type[Transfer]) -> None:
    """What may be without a reaction: a repeat, news that come too late, or an end after the verdict."""
    settled = {State.STOPPED, State.VERIFIED, State.STOPPING, State.JOINING, State.CANCELLING, State.CLOSED}
    for state in set(TRANSITIONS[end.role]) - settled:
        moving = {kind for kind, target in TRANSITIONS[end.role][state].items() if target is not state}
        silent = {kind for kind in moving if kind not in end.reactions[state]}
        assert silent <= {Decision.ADMIT, events.FetchWanted}, (state, silent)


def test_a_stranger_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="Heartbeat is no event"):
        make_sender().handle(events.MessageArrived(peer.Heartbeat("a", "b", ())), 0.0)


def test_messages_blame_the_peer_and_events_this_process() -> None:
    with pytest.raises(RemoteProtocolError, match="ACK is not legal for a sender in state `waiting`"):
        next_state(Role.SENDER, State.WAITING, peer.Ack)
    with pytest.raises(LocalProtocolError, match="Pinned is not legal for a receiver in state `landing`"):
        next_state(Role.RECEIVER, State.LANDING, events.Pinned)


def test_the_docs_diagram_is_drawn_from_the_table() -> None:
    docs = Path(__file__).parents[2] / "docs" / "transfer-states.md"
    assert docs.read_text() == render(), "run `python -m disagg.transceiver.protocol.diagram > docs/transfer-states.md`"
