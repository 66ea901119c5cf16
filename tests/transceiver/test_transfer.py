"""Both ends of one transfer: the usual story, who may ask, and what a soft computation may not leak."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.links.transfer_pair import (
    DECODE,
    FIRST,
    PREFILL,
    PROMPT,
    TRANSFER_ID,
    TransferPair,
    digest_of,
    final_unit,
    make_receiver,
    make_sender,
    make_ticket,
    needed_of,
)
from support.links.transfer_states import arrived, fetch, header, honest_done, landed, picture, reach, slice_message
from support.links.unchecked import raw

from disagg.transceiver.protocol.actions import AskPin, Land, ReportFailed, Send, Verified
from disagg.transceiver.protocol.events import (
    LandedUnit,
    LandingFailed,
    LandingStopped,
    Reserved,
    SliceLanded,
    SoftDropped,
)
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.ranges import MAX_RUNS
from disagg.transceiver.wire.messages.values import GroupRuns, UnitName


def messages(actions: list[object], kind: type) -> list[object]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


# --- the usual story ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["shm", "inproc", "zmq"])
def test_a_transfer_ends_with_one_licence_and_one_release(plane: str) -> None:
    pair = TransferPair(plane=plane)
    pair.run_whole()
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]
    assert pair.releases == ["acked"]
    assert pair.sender.is_over
    assert pair.receiver.is_over
    assert pair.remote_errors == []
    pair.check_invariants()


def test_the_ack_is_sent_before_the_licence_is_given() -> None:
    pair = TransferPair()
    pair.run_whole()
    ack = next(i for i, a in enumerate(pair.actions["receiver"]) if messages([a], p.Ack))
    licence = next(i for i, a in enumerate(pair.actions["receiver"]) if isinstance(a, Verified))
    assert ack < licence


def test_exactly_the_required_units_are_announced_once() -> None:
    pair = TransferPair()
    pair.run_whole(held=({0, 2, 4}, {5}))
    runs = [run for a in pair.of("sender", Send) if isinstance(a.message, p.Slice) for run in a.message.units]
    announced = [(run.group, run.first + i) for run in runs for i in range(run.count)]
    assert sorted(announced) == sorted(pair.required_keys) == [(0, 1), (0, 3), (0, 5), (0, 6), (1, 4), (1, 6)]
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]


def test_a_receiver_that_holds_everything_needs_no_slice() -> None:
    pair = TransferPair()
    pair.run_whole(held=(set(range(7)), set(range(7))))
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]
    assert not [a for a in pair.of("sender", Send) if isinstance(a.message, p.Slice)]


def test_units_are_announced_as_they_become_final_and_not_before_the_pin() -> None:
    pair = TransferPair()
    units = needed_of()
    pair.compute(units[:3])
    pair.reserve()
    pair.settle()
    assert pair.is_pin_wanted
    assert not [a for a in pair.of("sender", Send) if isinstance(a.message, p.Slice)]
    pair.pin()
    assert pair.sender.state is State.SENDING
    (said,) = [a.message for a in pair.of("sender", Send) if isinstance(a.message, p.Slice)]
    assert sum(run.count for run in said.units) == 3
    pair.compute(units[3:])
    pair.finish_prompt()
    pair.settle()
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]


@pytest.mark.parametrize(("plane", "has_slots"), [("shm", True), ("inproc", True), ("zmq", False)])
def test_only_planes_that_read_sources_learn_slots(plane: str, has_slots: bool) -> None:
    pair = TransferPair(plane=plane)
    pair.run_whole()
    runs = [run for a in pair.of("sender", Send) if isinstance(a.message, p.Slice) for run in a.message.units]
    assert all((len(run.slots) == len(run.generations) == run.count) is has_slots for run in runs)
    assert bool(pair.payloads) is not has_slots


def test_a_pushing_plane_sends_each_payload_once_and_stays_within_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.transceiver.protocol.outbox.BYTE_WINDOW", 4)  # one less than the slices of this prompt
    pair = TransferPair(plane="zmq")
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute()
    assert [payload.number for payload in pair.payloads] == [0, 1, 2, 3]
    pair.finish_prompt()
    assert pair.sender.state is State.SENDING, "one slice waits for credit, so nothing is done"
    pair.settle()
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]
    assert [payload.number for payload in pair.payloads] == [0, 1, 2, 3, 4]
    first = pair.payloads[0].units[0]
    assert (first.group, first.ordinal, first.slot, first.generation) == (0, 0, 10, 3)


def test_done_waits_for_slices_it_overtook() -> None:
    pair, end = reach(Role.RECEIVER, State.FETCHING)
    assert pair.feed(end, arrived(honest_done())) == []
    assert pair.feed(end, arrived(slice_message())) == [Land(slice_message())]
    actions = pair.feed(end, landed(slice_message(), pair))
    assert isinstance(actions[-1], Verified)


# --- FETCH --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ticket": b""}, "ticket"),
        ({"ticket": make_ticket(1)}, "ticket"),
        ({"ticket": make_ticket(prompt=(1, 2))}, "ticket"),
        ({"ticket": make_ticket(ttl_s=1.0)}, "ticket"),
        ({"prompt_len": 25}, "prompt_len"),
        ({"plane": "ucx"}, "plane"),
        ({"required": (GroupRuns(7, ()),)}, "required"),
        ({"required": (GroupRuns(1, ((0, 1),)),)}, "required"),
        ({"required": (raw(GroupRuns, 0, ((0, 2**62),)),)}, "required"),
    ],
)
def test_a_wrong_fetch_is_refused_by_field_and_changes_nothing(changes: dict[str, object], field: str) -> None:
    sender = make_sender()
    (action,) = sender.handle(arrived(fetch(**changes)), 0.0)
    assert isinstance(action.message, p.Refused)
    assert (action.message.field, action.message.transfer_id) == (field, TRANSFER_ID)
    assert sender.state is State.WAITING
    ask, accepted = sender.handle(arrived(fetch()), 0.0)
    assert isinstance(accepted.message, p.Accepted)
    assert ask == AskPin()


def test_an_answer_that_goes_on_is_fetched_with_its_prompt_under_a_ticket_for_both() -> None:
    prompt, output = PROMPT[:23], PROMPT[23:]
    sender = make_sender(prompt=prompt, output=output)
    for ticket, prompt_len in (
        (make_ticket(), 26),
        (make_ticket(prompt=prompt), 23),
        (make_ticket(prompt=prompt, output=output), 23),
    ):
        (action,) = sender.handle(arrived(fetch(ticket=ticket, prompt_len=prompt_len)), 0.0)
        assert isinstance(action.message, p.Refused)
    right = fetch(ticket=make_ticket(prompt=prompt, output=output), prompt_len=26)
    assert sender.handle(arrived(right), 0.0)[0] == AskPin()


def test_a_fetch_of_more_units_than_a_manifest_holds_is_refused_before_any_is_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_units = sum(len(entry.ordinals) for entry in fetch().required)
    monkeypatch.setattr("disagg.transceiver.protocol.sender.MAX_MANIFEST_ENTRIES", num_units - 1)
    sender = make_sender()
    (action,) = sender.handle(arrived(fetch()), 0.0)
    refused = p.Refused("required", f"at most {num_units - 1} units", f"{num_units} units", "", TRANSFER_ID)
    assert action.message == refused
    monkeypatch.setattr("disagg.transceiver.protocol.sender.MAX_MANIFEST_ENTRIES", num_units)
    assert sender.handle(arrived(fetch()), 0.0)[0] == AskPin()


def test_a_repeated_fetch_is_accepted_again_without_a_second_pin() -> None:
    pair, end = reach(Role.SENDER, State.PINNING)
    (action,) = pair.feed(end, arrived(replace(fetch(), header=header(Role.SENDER, 9))))
    assert isinstance(action.message, p.Accepted)


@pytest.mark.parametrize("state", [State.PINNING, State.SENDING, State.DECIDED])
def test_another_fetch_of_the_same_epoch_is_refused(state: State) -> None:
    pair, end = reach(Role.SENDER, state)
    (action,) = pair.feed(end, arrived(fetch(required=())))
    assert isinstance(action.message, p.Refused)
    assert end.state is state


def test_a_refused_fetch_fails_the_receiver() -> None:
    pair, end = reach(Role.RECEIVER, State.FETCHING)
    pair.feed(end, arrived(p.Refused("ticket", "a", "b", transfer_id=TRANSFER_ID)))
    assert pair.feed(end, LandingStopped()) == [ReportFailed("refused: ticket: expected a, got b")]


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"source": "other"}, {"destination": "other"}, {"transfer_id": "f" * 32}, {"epoch": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_message_of_another_process_or_epoch_raises_and_changes_nothing(changes: dict[str, object]) -> None:
    for role, state, message in (
        (Role.SENDER, State.WAITING, fetch()),
        (Role.RECEIVER, State.LANDING, honest_done()),
    ):
        _, end = reach(role, state)
        before = picture(end)
        with pytest.raises(RemoteProtocolError, match="reached"):
            end.handle(arrived(replace(message, header=replace(message.header, **changes))), 0.0)
        assert picture(end) == before


def test_a_refusal_of_another_transfer_raises() -> None:
    _, end = reach(Role.RECEIVER, State.FETCHING)
    with pytest.raises(RemoteProtocolError, match="reached"):
        end.handle(arrived(p.Refused("ticket", "a", "b", transfer_id="other")), 0.0)


def test_a_receipt_for_slices_never_announced_raises_and_changes_nothing() -> None:
    _, end = reach(Role.SENDER, State.SENDING)
    before = picture(end)
    for number in (0, -2):
        with pytest.raises(RemoteProtocolError, match="RECEIVED"):
            end.handle(arrived(raw(p.Received, header(Role.SENDER), number)), 0.0)
    assert picture(end) == before


def test_the_shell_may_report_only_landings_that_were_asked_for() -> None:
    _pair, end = reach(Role.RECEIVER, State.LANDING)
    before = picture(end)
    for event in (
        SliceLanded(1, ()),
        SliceLanded(0, (LandedUnit(0, 0, 1),)),
        LandingFailed(1, "lost"),
    ):
        with pytest.raises(LocalProtocolError, match="was not being landed"):
            end.handle(event, 0.0)
    assert picture(end) == before


def test_a_reservation_of_what_no_transfer_brings_is_a_local_error() -> None:
    receiver = make_receiver()
    with pytest.raises(LocalProtocolError, match="reserved what no transfer brings"):
        receiver.handle(Reserved((GroupRuns(1, ((0, 1),)),), 26), 0.0)
    assert receiver.state is State.WAITING


def test_a_reservation_in_more_runs_than_a_fetch_may_name_is_a_local_error_and_asks_for_nothing() -> None:
    receiver = make_receiver()
    half = MAX_RUNS // 2 + 1
    scattered = tuple(GroupRuns(group, tuple((2 * number, 1) for number in range(half))) for group in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("disagg.transceiver.protocol.receiver.check_required", lambda required, need: None)
        with pytest.raises(LocalProtocolError, match=f"{2 * half} runs, one FETCH names at most {MAX_RUNS}"):
            receiver.handle(Reserved(scattered, 26), 0.0)
    assert receiver.state is State.WAITING
    with pytest.raises(ValueError, match="required: runs"):
        p.Fetch(header(Role.RECEIVER), b"", 26, scattered, "shm")


# --- soft computations --------------------------------------------------------------------------------------


def test_only_units_of_the_pinned_computation_are_announced() -> None:
    pair = TransferPair()
    stale = tuple(replace(unit, slot=99, digest=1) for unit in needed_of())
    pair.compute(stale, compute_id=1)
    pair.finish_prompt(compute_id=1)
    pair.feed(pair.sender, SoftDropped(1))
    pair.compute(stale, compute_id=1)
    pair.finish_prompt(compute_id=1)
    pair.reserve()
    pair.settle()
    pair.compute(compute_id=2)
    pair.pin(compute_id=2)
    pair.compute(stale, compute_id=1)
    pair.finish_prompt(compute_id=1)
    assert pair.sender.state is State.SENDING
    pair.finish_prompt(compute_id=2)
    pair.settle()
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]


def test_a_prompt_computed_before_the_fetch_is_done_at_the_pin() -> None:
    pair = TransferPair()
    pair.compute()
    pair.finish_prompt()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.settle()
    assert pair.verdicts == [Verified(TRANSFER_ID, 0, FIRST)]


def test_a_required_unit_that_never_becomes_final_fails_by_name() -> None:
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute(needed_of()[1:])
    pair.finish_prompt()
    pair.settle()
    assert pair.verdicts == [ReportFailed(reasons.INCOMPLETE, (UnitName(0, 0),))]
    assert pair.releases == ["failed"]
    assert pair.sender.is_over


# --- facts --------------------------------------------------------------------------------------------------


def test_a_transfer_knows_who_it_is() -> None:
    sender, receiver = make_sender(epoch=3), make_receiver(epoch=3)
    assert all((end.ends.transfer_id, end.ends.epoch) == (TRANSFER_ID, 3) for end in (sender, receiver))
    assert (sender.peer, receiver.peer) == (DECODE, PREFILL)
    assert (sender.role, receiver.role) == (Role.SENDER, Role.RECEIVER)


def test_only_a_receiver_that_reads_sources_wants_their_lease() -> None:
    wanting = {State.FETCHING, State.LANDING, State.VERIFIED, State.STOPPING, State.JOINING}
    assert {s for s in wanting if reach(Role.RECEIVER, s)[1].wants_lease} == {State.FETCHING, State.LANDING}


def test_the_pretend_engine_computes_what_is_needed() -> None:
    assert final_unit(0, 3).digest == digest_of(0, 3) != digest_of(0, 4)
