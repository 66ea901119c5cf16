from __future__ import annotations

from pathlib import Path

import pytest
from support.transfer_states import picture, reach, sample_event

from disagg.transceiver.protocol import events
from disagg.transceiver.protocol.diagram import render
from disagg.transceiver.protocol.state import (
    DECISIONS,
    KIND_OF,
    MESSAGES,
    TRANSITIONS,
    Kind,
    Role,
    State,
    kind_of,
    next_state,
)
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Heartbeat, Refused, TransferMessage

EXTERNAL = [kind for kind in Kind if kind not in DECISIONS]
PAIRS = [(role, state, kind) for role in Role for state in TRANSITIONS[role] for kind in EXTERNAL]


def name_of(value: object) -> str:
    return str(getattr(value, "name", value))


def reachable_by_decision(role: Role, state: State) -> set[State]:
    """States that decisions can lead to from `state`, in any number of steps."""
    found = {state}
    for _ in DECISIONS:
        found |= {TRANSITIONS[role][s][kind] for s in found for kind in DECISIONS if kind in TRANSITIONS[role][s]}
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
def test_every_state_but_the_first_is_somebodys_target(role: Role) -> None:
    targets = {target for row in TRANSITIONS[role].values() for target in row.values()}
    assert targets | {State.WAITING} == set(TRANSITIONS[role])


@pytest.mark.parametrize("role", Role)
def test_a_lost_peer_is_legal_in_every_state(role: Role) -> None:
    assert all(
        Kind.PEER_GONE in row and Kind.TICK in row and Kind.CANCEL_ASKED in row for row in TRANSITIONS[role].values()
    )


def test_every_event_and_message_has_a_kind() -> None:
    kinds = {*events.Event.__args__, *TransferMessage.__args__, Refused} - {events.MessageArrived}
    assert kinds == set(KIND_OF)


def test_a_stranger_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="Heartbeat is no event"):
        kind_of(events.MessageArrived(Heartbeat("a", "b", ())))


def test_messages_blame_the_peer_and_events_this_process() -> None:
    with pytest.raises(RemoteProtocolError, match="ACK is not legal for a sender in state `waiting`"):
        next_state(Role.SENDER, State.WAITING, Kind.ACK)
    with pytest.raises(LocalProtocolError, match="Pinned is not legal for a receiver in state `landing`"):
        next_state(Role.RECEIVER, State.LANDING, Kind.PINNED)


def test_the_docs_diagram_is_drawn_from_the_table() -> None:
    docs = Path(__file__).parents[2] / "docs" / "transfer-states.md"
    assert docs.read_text() == render(), "run `python -m disagg.transceiver.protocol.diagram > docs/transfer-states.md`"
