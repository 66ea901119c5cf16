"""Outbox and inbox: the two ends of the numbering of slices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.links.sample_messages import HEADER
from support.links.unchecked import raw

from disagg.transceiver.layout.slice_size import SLICE_NBYTES
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.protocol.events import LandedUnit
from disagg.transceiver.protocol.inbox import BadSliceError, Inbox
from disagg.transceiver.protocol.outbox import BYTE_WINDOW, READ_SLICE_NBYTES, REPEAT_BURST, Outbox
from disagg.transceiver.protocol.sender import unit_runs
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.peer import Slice
from disagg.transceiver.wire.messages.ranges import MAX_SLICE_RUNS, MAX_SLICE_UNITS
from disagg.transceiver.wire.messages.values import UnitName, UnitRun


def unit(ordinal: int, group: int = 0) -> HashedUnit:
    return HashedUnit(group, ordinal, 0, 100 + ordinal, 1, 7 * ordinal)


def keys(count: int, group: int = 0) -> list[tuple[int, int]]:
    return [(group, ordinal) for ordinal in range(count)]


@given(
    st.lists(st.integers(1, 3 * READ_SLICE_NBYTES // 2), min_size=2, max_size=2),
    st.lists(st.integers(1, 12), max_size=6),
)
def test_slices_hold_every_unit_once_in_order_within_the_cap(sizes: list[int], batches: list[int]) -> None:
    total = sum(batches)
    outbox, sent, given_units = Outbox(keys(total), sizes, pushes_bytes=False), [], iter(range(total))
    for batch in batches:
        outbox.add([unit(next(given_units)) for _ in range(batch)])
        for number in outbox.cut():
            units = outbox.slice_units(number)
            assert len(units) == 1 or sizes[0] * len(units) <= READ_SLICE_NBYTES
            sent += units
    assert sent == [unit(o) for o in range(total)] == list(outbox.announced)
    assert outbox.is_all_announced


def test_the_cap_is_exact() -> None:
    half = SLICE_NBYTES // 2
    fits, too_much = (
        Outbox(keys(2), [half], pushes_bytes=True),
        Outbox([(0, 0), (1, 0)], [half, half + 1], pushes_bytes=True),
    )
    fits.add([unit(0), unit(1)])
    too_much.add([unit(0), unit(0, group=1)])
    assert (fits.cut(), too_much.cut()) == ([0], [0, 1])


def test_a_unit_larger_than_the_cap_goes_alone() -> None:
    outbox = Outbox(keys(2), [SLICE_NBYTES + 1], pushes_bytes=True)
    outbox.add([unit(0), unit(1)])
    assert outbox.cut() == [0, 1]


def test_units_nobody_asked_for_and_repeats_are_not_sent() -> None:
    outbox = Outbox(keys(1), [1, 1], pushes_bytes=True)
    outbox.add([unit(0), unit(0), unit(5), unit(0, group=1)])
    outbox.add([unit(0)])
    assert outbox.cut() == [0]
    assert outbox.announced == (unit(0),)


def test_the_window_holds_slices_back_until_others_have_landed() -> None:
    outbox = Outbox(keys(BYTE_WINDOW + 5), [SLICE_NBYTES], pushes_bytes=True)
    outbox.add([unit(o) for o in range(BYTE_WINDOW + 5)])
    assert outbox.cut() == list(range(BYTE_WINDOW))
    assert outbox.cut() == []
    assert not outbox.is_all_announced
    assert outbox.missing == ()
    assert outbox.acknowledge(1)
    assert outbox.cut() == [BYTE_WINDOW, BYTE_WINDOW + 1]


def test_slices_that_are_read_are_larger_and_none_waits_for_a_receipt() -> None:
    num_units, num_slices = READ_SLICE_NBYTES // SLICE_NBYTES, BYTE_WINDOW + 2
    outbox = Outbox(keys(num_units * num_slices), [SLICE_NBYTES], pushes_bytes=False)
    outbox.add([unit(o) for o in range(num_units * num_slices)])
    assert outbox.cut() == list(range(num_slices))
    assert [len(outbox.slice_units(number)) for number in range(num_slices)] == [num_units] * num_slices


@pytest.mark.parametrize(("step", "most"), [(1, MAX_SLICE_UNITS), (2, MAX_SLICE_RUNS)])
def test_a_slice_names_no_more_than_one_message_may(step: int, most: int) -> None:
    ordinals = range(0, step * (2 * most + 3), step)
    outbox = Outbox([(0, ordinal) for ordinal in ordinals], [1], pushes_bytes=False)
    outbox.add([unit(ordinal) for ordinal in ordinals])
    assert outbox.cut() == [0, 1, 2]
    assert [len(outbox.slice_units(number)) for number in range(3)] == [most, most, 3]
    assert all(decode(encode(slice_of(n, *unit_runs(outbox.slice_units(n), True)))) for n in range(3))


def test_old_receipts_are_no_news() -> None:
    outbox = Outbox(keys(3), [SLICE_NBYTES], pushes_bytes=True)
    outbox.add([unit(o) for o in range(3)])
    outbox.cut()
    assert [outbox.acknowledge(number) for number in (-1, 1, 0, 1, 2)] == [False, True, False, False, True]
    assert list(outbox.unanswered) == []


def test_a_repeat_is_bounded() -> None:
    outbox = Outbox(keys(40), [READ_SLICE_NBYTES], pushes_bytes=False)
    outbox.add([unit(o) for o in range(40)])
    outbox.cut()
    assert outbox.unanswered == range(REPEAT_BURST)


def test_slots_and_generations_travel_only_where_they_are_read() -> None:
    units = (unit(1), unit(2), unit(4), unit(5, group=1))
    assert unit_runs(units, False) == (UnitRun(0, 1, 2), UnitRun(0, 4, 1), UnitRun(1, 5, 1))
    assert unit_runs(units, True)[0] == UnitRun(0, 1, 2, (101, 102), (1, 1))


# --- inbox --------------------------------------------------------------------------------------------------


def slice_of(number: int, *runs: UnitRun) -> Slice:
    return raw(Slice, HEADER, number, runs)


def landed(*ordinals: int) -> list[LandedUnit]:
    return [LandedUnit(0, o, 7 * o) for o in ordinals]


def test_receipts_name_the_highest_slice_without_a_gap() -> None:
    inbox = Inbox(keys(3))
    for number in range(3):
        assert inbox.announce(slice_of(number, UnitRun(0, number, 1)))
    seen = []
    for number in (2, 0, 1):
        inbox.land(number, landed(number))
        seen.append(inbox.highest)
    assert seen == [-1, 0, 2]
    assert inbox.is_all_landed


def test_a_repeated_slice_is_not_taken_twice() -> None:
    inbox = Inbox(keys(2))
    assert inbox.announce(slice_of(0, UnitRun(0, 0, 1)))
    assert not inbox.announce(slice_of(0, UnitRun(0, 0, 1)))
    assert inbox.num_announced == 1


@pytest.mark.parametrize(
    "message",
    [
        slice_of(0),
        slice_of(-1, raw(UnitRun, 0, 0, 1)),
        slice_of(4, raw(UnitRun, 0, 0, 1)),
        slice_of(1, raw(UnitRun, 0, 0, 2**60)),
        slice_of(1, raw(UnitRun, 0, 0, -1)),
        slice_of(1, raw(UnitRun, 0, 4, 1)),
        slice_of(1, raw(UnitRun, 1, 0, 1)),
        slice_of(1, raw(UnitRun, 0, -1, 1)),
        slice_of(1, raw(UnitRun, 0, 1, 1), raw(UnitRun, 0, 1, 1)),
        slice_of(1, raw(UnitRun, 0, 3, 1)),
        slice_of(1, raw(UnitRun, 0, 0, 2), raw(UnitRun, 0, 0, -1)),
        slice_of(1, raw(UnitRun, 0, 0, 1, (1, 2), (1,))),
        slice_of(1, raw(UnitRun, 0, 0, 1, (1,), (1, 2))),
    ],
)
def test_a_slice_no_honest_sender_says_is_refused_and_changes_nothing(message: Slice) -> None:
    inbox = Inbox(keys(4))
    inbox.announce(slice_of(3, UnitRun(0, 3, 1)))
    with pytest.raises(BadSliceError):
        inbox.announce(message)
    assert inbox.num_announced == 1
    assert inbox.announce(slice_of(0, UnitRun(0, 0, 3)))


def test_landings_must_name_exactly_the_units_of_their_slice() -> None:
    inbox = Inbox(keys(2))
    inbox.announce(slice_of(0, UnitRun(0, 0, 2)))
    assert inbox.expects(0, landed(1, 0))
    assert not inbox.expects(0, landed(0))
    assert not inbox.expects(0, landed(0, 1, 1))
    assert not inbox.expects(1, landed(0, 1))
    inbox.land(0, landed(0, 1))
    assert not inbox.expects(0, landed(0, 1))


@pytest.mark.parametrize(
    "named", [{0: {0: 1}}, {0: {0: 1, 1: 1, 2: 1}}, {0: {0: 1, 2: 1}}, {1: {0: 1, 1: 1}}, {0: {0: 1, 1: 1}, 1: {0: 1}}]
)
def test_a_manifest_covers_what_was_required_or_does_not(named: dict[int, dict[int, int]]) -> None:
    inbox = Inbox(keys(2))
    assert inbox.is_covered([GroupDigests.of(0, (0, 1, 0, 1), {0: 1, 1: 1})])
    assert not inbox.is_covered([GroupDigests.of(group, (0, 1, 0, 1), units) for group, units in named.items()])


def test_units_whose_digest_differs_are_named() -> None:
    inbox = Inbox(keys(2))
    inbox.announce(slice_of(0, UnitRun(0, 0, 2)))
    inbox.land(0, landed(0, 1))
    manifest = [GroupDigests.of(0, (0, 1, 0, 1), {0: 0, 1: 8})]
    assert inbox.is_covered(manifest)
    assert inbox.disagreeing(manifest) == (UnitName(0, 1),)
