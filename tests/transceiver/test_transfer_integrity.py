"""The ways in which wrong bytes must not pass: each check is shown to fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.links.transfer_pair import (
    COMPUTE_ID,
    FIRST,
    KEYS,
    TransferPair,
    make_receiver,
    make_reserved,
    make_sender,
    make_ticket,
    needed_of,
)
from support.links.transfer_states import arrived, fetch, header, honest_done, landed, reach, slice_message
from support.links.unchecked import changed

from disagg.transceiver.protocol.actions import ReportFailed, Send, UnregisterUnits, Verified
from disagg.transceiver.protocol.events import (
    LandingFailed,
    LandingStopped,
    Pinned,
    PromptComputed,
    SliceLanded,
    UnitsFinal,
)
from disagg.transceiver.protocol.manifest import seal
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.ranges import MAX_NAMED_UNITS
from disagg.transceiver.wire.messages.values import UnitName, nameable


def messages(actions: list[object], kind: type) -> list[object]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


# --- wrong bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [(0, 0), (0, 6), (1, 4), (1, 6)])
@pytest.mark.parametrize("plane", ["shm", "zmq"])
def test_one_wrong_unit_fails_the_transfer_and_is_unregistered(unit: tuple[int, int], plane: str) -> None:
    pair = TransferPair(plane=plane)
    pair.corrupt = {unit}
    pair.run_whole()
    assert pair.verdicts == [ReportFailed(reasons.DIGEST, (UnitName(*unit),))]
    assert pair.unregistered == [unit]
    assert pair.releases == ["cancelled"]
    pair.check_invariants()


def test_two_swapped_ordinals_are_found() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    units = list(landed(slice_message(), pair).units)
    units[0], units[1] = replace(units[0], digest=units[1].digest), replace(units[1], digest=units[0].digest)
    pair.feed(end, SliceLanded(0, tuple(units)))
    pair.feed(end, arrived(honest_done()))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.DIGEST, (UnitName(0, 0), UnitName(0, 1)))]


def test_a_manifest_of_epoch_1_replayed_in_epoch_2_is_refused() -> None:
    first = make_sender(epoch=1)
    first.handle(arrived(replace(fetch(), header=replace(header(Role.SENDER), epoch=1), ticket=make_ticket(1))), 0.0)
    first.handle(UnitsFinal(COMPUTE_ID, needed_of()), 0.0)
    first.handle(Pinned(COMPUTE_ID), 0.0)
    (done,) = messages(first.handle(PromptComputed(COMPUTE_ID, FIRST), 0.0), p.Done)
    second = make_receiver(epoch=2)
    second.handle(make_reserved(), 0.0)
    with pytest.raises(RemoteProtocolError):
        second.handle(arrived(done), 0.0)
    actions = second.handle(arrived(replace(done, header=replace(done.header, epoch=2))), 0.0)
    assert [m.reason for m in messages(actions, p.Cancel)] == [reasons.MAC]
    assert second.handle(LandingStopped(), 0.0) == [ReportFailed(reasons.MAC)]


def test_a_source_slot_reallocated_before_the_copy_fails_the_transfer() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    actions = pair.feed(end, LandingFailed(0, "source changed", (UnitName(0, 1),)))
    assert [(m.reason, m.units) for m in messages(actions, p.Cancel)] == [("source changed", (UnitName(0, 1),))]
    assert pair.feed(end, LandingStopped()) == [ReportFailed("source changed", (UnitName(0, 1),))]


def test_non_finite_bytes_fail_the_transfer_and_are_unregistered() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    event = landed(slice_message(), pair)
    actions = pair.feed(end, replace(event, units=(replace(event.units[0], finite=False), *event.units[1:])))
    (cancel,) = messages(actions, p.Cancel)
    assert (cancel.reason, cancel.units) == (reasons.NON_FINITE, (UnitName(0, 0),))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.NON_FINITE, (UnitName(0, 0),))]
    sending, sender = reach(Role.SENDER, State.DECIDED)
    assert UnregisterUnits((UnitName(0, 0),)) in sending.feed(
        sender, arrived(replace(cancel, header=header(Role.SENDER)))
    )


def test_only_units_that_were_announced_can_be_unregistered() -> None:
    pair, end = reach(Role.SENDER, State.DECIDED)
    blamed = (UnitName(0, 3), UnitName(1, 0), UnitName(9, 9))
    actions = pair.feed(end, arrived(p.Cancel(header(Role.SENDER), reasons.DIGEST, blamed)))
    assert UnregisterUnits((UnitName(0, 3),)) in actions


def test_a_report_that_could_not_name_all_units_unregisters_what_was_announced() -> None:
    pair, end = reach(Role.SENDER, State.DECIDED)
    actions = pair.feed(end, arrived(p.Cancel(header(Role.SENDER), reasons.DIGEST)))
    announced = {(run.group, run.first + i) for run in slice_message().units for i in range(run.count)}
    (action,) = (action for action in actions if isinstance(action, UnregisterUnits))
    assert {(unit.group, unit.ordinal) for unit in action.units} >= announced


def test_units_are_named_all_or_not_at_all() -> None:
    units = tuple(UnitName(0, ordinal) for ordinal in range(MAX_NAMED_UNITS + 1))
    assert nameable(units[1:]) == units[1:]
    assert nameable(units) == ()


def resealed(**changes: object) -> p.Done:
    """A DONE whose seal holds and whose content is wrong: only a sender with a defect says it."""
    done = changed(honest_done(), **changes)
    return seal(
        KEYS.manifest_mac,
        done.header,
        rank=done.rank,
        num_ranks=done.num_ranks,
        num_slices=done.num_slices,
        manifest=done.manifest,
        first_token=done.first_token,
    )


ENTRIES = honest_done().manifest


def with_units(entry: GroupDigests, more: dict[int, int]) -> GroupDigests:
    return GroupDigests.of(entry.group, entry.rectangle, entry.by_ordinal() | more)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 1},
        {"num_ranks": 2},
        {"first_token": None},
        {"num_slices": 0},
        {"num_slices": 99},
        {"manifest": ENTRIES[1:]},
        {"manifest": (*ENTRIES, replace(ENTRIES[0], group=ENTRIES[-1].group + 1))},
        {"manifest": (with_units(ENTRIES[0], {99: 1}), *ENTRIES[1:])},
        {"manifest": (GroupDigests.of(0, ENTRIES[0].rectangle, {99: 1}), *ENTRIES[1:])},
        {"manifest": (replace(ENTRIES[0], rectangle=(0, 1, 0, 1)), *ENTRIES[1:])},
    ],
)
def test_a_done_that_does_not_cover_what_was_required_fails(changes: dict[str, object]) -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    pair.feed(end, arrived(resealed(**changes)))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.PROTOCOL)]


def test_a_done_that_counts_more_slices_than_there_are_units_for_fails() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    pair.feed(end, arrived(resealed(num_slices=2)))
    pair.feed(end, landed(slice_message(), pair))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.PROTOCOL)]


def test_a_slice_beyond_what_done_counted_fails() -> None:
    pair, end = reach(Role.RECEIVER, State.FETCHING)
    pair.feed(end, arrived(resealed(num_slices=1)))
    pair.feed(end, arrived(slice_message(1)))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.PROTOCOL)]


def test_a_slice_of_units_nobody_asked_for_fails() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    pair.feed(end, arrived(slice_message(1)))
    assert pair.feed(end, LandingStopped()) == [ReportFailed(reasons.PROTOCOL)]


def test_the_first_done_counts() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    pair.feed(end, arrived(honest_done()))
    assert pair.feed(end, arrived(replace(honest_done(), mac=b"forged"))) == []
    assert isinstance(pair.feed(end, landed(slice_message(), pair))[-1], Verified)
