"""Every way a transfer ends, and when: cancelled, failed, finished early, lost, overdue."""

from __future__ import annotations

import pytest
from support.links.transfer_pair import (
    COMPUTE_ID,
    DEADLINE_S,
    TransferPair,
    make_receiver,
    make_reserved,
    make_sender,
    needed_of,
)
from support.links.transfer_states import arrived, fetch, header, honest_done, reach, slice_message

from disagg.transceiver.protocol.actions import FreeReservation, ReleaseSource, ReportFailed, Send, StopLanding
from disagg.transceiver.protocol.events import (
    CancelAsked,
    ComputeFailed,
    FinishedEarly,
    LandingStopped,
    LeaseRenewed,
    PeerGone,
    Tick,
    UnitsFinal,
)
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import UnitName
from disagg.transceiver.wire.timing import LEASE_S


def messages(actions: list[object], kind: type) -> list[object]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


@pytest.mark.parametrize("state", [State.WAITING, State.SENDING])
def test_a_sender_whose_peer_was_lost_answers_nothing_that_still_arrives(state: State) -> None:
    pair, sender = reach(Role.SENDER, state)
    assert pair.feed(sender, PeerGone("end of file"))
    assert sender.is_over
    for late in (arrived(fetch()), arrived(p.Received(header(Role.SENDER), -1))):
        assert not messages(pair.feed(sender, late), object)


@pytest.mark.parametrize("dispatched_at", [0.0, 1e9])
def test_a_tickets_age_is_counted_from_dispatch_on_the_clock_of_the_worker_that_verifies_it(
    dispatched_at: float,
) -> None:
    """FETCH says nothing of time: the same ticket admits until its `ttl_s` is over by the sender's clock alone."""
    young, old = make_sender(dispatched_at), make_sender(dispatched_at)
    admitted = young.handle(arrived(fetch()), dispatched_at + DEADLINE_S - 0.1)
    assert messages(admitted, p.Accepted)
    old.handle(Tick(), dispatched_at + DEADLINE_S)
    refused = old.handle(arrived(fetch()), dispatched_at + DEADLINE_S + 0.1)
    assert not messages(refused, p.Accepted)
    assert [word.reason for word in messages(refused, p.Failed)] == [reasons.DEADLINE]  # type: ignore[attr-defined]


# --- endings ------------------------------------------------------------------------------------------------


def test_an_answer_that_ends_with_its_first_token_moves_nothing() -> None:
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.feed(pair.sender, FinishedEarly(COMPUTE_ID))
    pair.settle()
    assert pair.verdicts == [FreeReservation(reasons.FINISHED)]
    assert pair.releases == ["finished"]
    assert pair.sender.is_over
    assert pair.receiver.is_over


@pytest.mark.parametrize(
    ("event", "verdict"),
    [
        (FinishedEarly(COMPUTE_ID), FreeReservation(reasons.FINISHED)),
        (ComputeFailed("non-finite"), ReportFailed("non-finite")),
        (CancelAsked(reasons.CANCELLED), ReportFailed(reasons.CANCELLED)),
    ],
)
def test_an_ending_before_the_fetch_is_told_to_the_fetch_that_comes_late(event: object, verdict: object) -> None:
    pair = TransferPair()
    pair.feed(pair.sender, event)
    assert pair.sender.is_over
    pair.reserve()
    pair.settle()
    assert pair.verdicts == [verdict]
    assert pair.receiver.is_over
    pair.check_invariants()


def test_a_cancel_by_the_receiver_frees_the_sources_and_then_the_reservation() -> None:
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute()
    pair.feed(pair.receiver, CancelAsked(reasons.CANCELLED))
    pair.settle()
    assert pair.verdicts == [FreeReservation(reasons.CANCELLED)]
    assert pair.releases == ["cancelled"]
    assert pair.sender.is_over
    assert pair.receiver.is_over


def test_a_cancel_before_anything_was_reserved_asks_nothing_of_the_peer() -> None:
    pair = TransferPair()
    actions = pair.feed(pair.receiver, CancelAsked(reasons.CANCELLED))
    assert actions[0] == FreeReservation(reasons.CANCELLED)
    assert pair.receiver.is_over
    assert pair.feed(pair.receiver, make_reserved()) == []


@pytest.mark.parametrize("state", [State.STOPPING, State.JOINING])
def test_a_failing_transfer_that_is_cancelled_reports_the_cancel(state: State) -> None:
    pair, end = reach(Role.RECEIVER, state)
    pair.feed(end, CancelAsked("disconnect"))
    assert pair.feed(end, LandingStopped())[0] == FreeReservation("disconnect")


@pytest.mark.parametrize("state", [State.STOPPING, State.CANCELLING])
@pytest.mark.parametrize("answer", [p.Cancelled, p.Closed])
def test_the_report_and_the_answer_to_cancel_do_not_wait_for_each_other(state: State, answer: type) -> None:
    pair, end = reach(Role.RECEIVER, State.STOPPING)
    reply = p.Cancelled(header(Role.RECEIVER), "x") if answer is p.Cancelled else p.Closed(header(Role.RECEIVER))
    steps = [arrived(reply), LandingStopped()]
    for event in steps if state is State.STOPPING else steps[::-1]:
        pair.feed(end, event)
    assert end.is_over
    assert len(pair.verdicts) == 1


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        (
            p.Failed(header(Role.RECEIVER), "non-finite", (UnitName(0, 1),)),
            ReportFailed("non-finite", (UnitName(0, 1),)),
        ),
        (p.Cancelled(header(Role.RECEIVER), "cancelled"), ReportFailed("cancelled")),
        (p.Closed(header(Role.RECEIVER)), ReportFailed(reasons.UNKNOWN)),
    ],
)
@pytest.mark.parametrize("state", [State.FETCHING, State.LANDING])
def test_the_peers_terminal_word_ends_the_receiver(message: object, verdict: object, state: State) -> None:
    pair, end = reach(Role.RECEIVER, state)
    assert StopLanding() in pair.feed(end, arrived(message))
    assert verdict in pair.feed(end, LandingStopped())


@pytest.mark.parametrize("state", [State.WAITING, State.FETCHING, State.LANDING])
def test_a_lost_prefill_worker_is_reported_once_jobs_are_joined(state: State) -> None:
    pair, end = reach(Role.RECEIVER, state)
    pair.feed(end, PeerGone("end of file"))
    if state is not State.WAITING:
        assert pair.verdicts == []
        pair.feed(end, LandingStopped())
    assert pair.verdicts == [ReportFailed(reasons.LOST)]
    assert end.is_over


@pytest.mark.parametrize("state", [State.WAITING, State.PINNING, State.SENDING, State.DECIDED])
def test_a_lost_decode_worker_releases_the_sources_at_once(state: State) -> None:
    pair, end = reach(Role.SENDER, state)
    assert ReleaseSource(reasons.LOST) in pair.feed(end, PeerGone("end of file"))
    assert end.is_over


@pytest.mark.parametrize("state", [State.PINNING, State.SENDING])
def test_a_sender_that_was_told_to_stop_says_so_until_it_is_heard(state: State) -> None:
    pair, end = reach(Role.SENDER, state)
    actions = pair.feed(end, CancelAsked("disconnect"))
    assert [m.reason for m in messages(actions, p.Cancelled)] == ["disconnect"]
    assert ReleaseSource(reasons.CANCELLED) in actions
    assert pair.feed(end, arrived(p.Ack(header(Role.SENDER))))[0].message == p.Closed(end.last_word.header)


def test_a_sender_that_said_done_says_nothing_else() -> None:
    pair, end = reach(Role.SENDER, State.DECIDED)
    actions = pair.feed(end, CancelAsked("disconnect"))
    assert messages(actions, p.Cancelled) == []
    assert pair.releases == ["cancelled"]
    (answer,) = pair.feed(end, arrived(fetch()))
    assert isinstance(answer.message, p.Closed)


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (State.WAITING, p.Cancelled),
        (State.PINNING, p.Cancelled),
        (State.SENDING, p.Cancelled),
        (State.DECIDED, p.Closed),
        (State.STOPPED, p.Closed),
        (State.CLOSED, p.Closed),
    ],
)
def test_cancel_is_answered_in_every_state(state: State, answer: type) -> None:
    pair, end = reach(Role.SENDER, state)
    actions = pair.feed(end, arrived(p.Cancel(header(Role.SENDER), "retarget")))
    assert isinstance(actions[0].message, answer)
    assert end.is_over
    assert len(pair.releases) == 1


def test_the_first_answer_to_a_terminal_word_is_repeated_on_demand() -> None:
    pair, end = reach(Role.RECEIVER, State.VERIFIED)
    assert messages(pair.feed(end, arrived(honest_done())), p.Ack)
    pair.feed(end, arrived(p.Closed(header(Role.RECEIVER))))
    assert messages(pair.feed(end, arrived(honest_done())), p.Ack)
    waiting, early = reach(Role.RECEIVER, State.CLOSED)
    assert waiting.feed(early, arrived(p.Failed(header(Role.RECEIVER), "x"))) == []


# --- time ---------------------------------------------------------------------------------------------------


def ticks_until(end: Transfer, until: float) -> list[tuple[float, list[object]]]:
    """Tick an end whenever it asks, alone."""
    log = []
    while (at := end.next_wakeup()) is not None and at <= until:
        log.append((at, end.handle(Tick(), at)))
        after = end.next_wakeup()
        assert after is None or after > at
    return log


def test_fetch_repeats_with_doubling_until_the_deadline_which_is_lost() -> None:
    _pair, end = reach(Role.RECEIVER, State.FETCHING)
    log = ticks_until(end, 5.0)
    assert [round(at, 3) for at, actions in log if messages(actions, p.Fetch)] == [0.2, 0.6, 1.4, 3.0, 5.0]
    log = ticks_until(end, DEADLINE_S)
    assert [m.reason for m in messages(log[-1][1], p.Cancel)] == [reasons.DEADLINE]
    assert end.handle(LandingStopped(), DEADLINE_S) == [ReportFailed(reasons.LOST)]
    ticks_until(end, 1000.0)
    assert end.is_over


def test_repeats_carry_new_sequence_numbers() -> None:
    _, end = reach(Role.RECEIVER, State.FETCHING)
    sequences = [m.header.sequence for _, actions in ticks_until(end, 5.0) for m in messages(actions, p.Fetch)]
    assert sequences == sorted(set(sequences))


def test_a_receiver_without_reservation_reports_at_the_deadline() -> None:
    receiver = make_receiver()
    assert receiver.next_wakeup() == DEADLINE_S
    assert receiver.handle(Tick(), DEADLINE_S)[0] == ReportFailed(reasons.LOST)
    assert receiver.is_over


@pytest.mark.parametrize("state", [State.PINNING, State.SENDING, State.DECIDED])
def test_pins_end_when_heartbeats_stop_naming_the_transfer(state: State) -> None:
    _pair, end = reach(Role.SENDER, state)
    end.handle(LeaseRenewed(), 3.0)
    log = ticks_until(end, 3.0 + LEASE_S)
    assert log[-1][0] == 3.0 + LEASE_S
    assert ReleaseSource(reasons.LOST) in log[-1][1]
    failed = messages(log[-1][1], p.Failed)
    assert [m.reason for m in failed] == ([] if state is State.DECIDED else [reasons.LEASE])


@pytest.mark.parametrize("state", [State.WAITING, State.PINNING, State.SENDING, State.DECIDED])
def test_pins_end_at_the_deadline_whatever_heartbeats_say(state: State) -> None:
    _pair, end = reach(Role.SENDER, state)
    for second in range(int(DEADLINE_S)):
        ticks_until(end, float(second))
        end.handle(LeaseRenewed(), float(second))
    log = ticks_until(end, DEADLINE_S)
    assert log[-1][1][-1 if end.state is State.STOPPED else -2] == ReleaseSource(reasons.DEADLINE)
    ticks_until(end, 1000.0)
    assert end.is_over


def test_slices_repeat_until_a_receipt_covers_them() -> None:
    pair, end = reach(Role.SENDER, State.SENDING)
    for units in (needed_of()[:2], needed_of()[2:3]):  # what became final together is one slice
        pair.feed(end, UnitsFinal(COMPUTE_ID, units))
    log = ticks_until(end, 0.25)
    assert [m.number for m in messages(log[0][1], p.Slice)] == [0, 1]
    end.handle(arrived(p.Received(header(Role.SENDER), 0)), 0.3)
    end.handle(arrived(p.Received(header(Role.SENDER), 0)), 0.4)
    log = ticks_until(end, 0.6)
    assert [(round(at, 3), m.number) for at, actions in log for m in messages(actions, p.Slice)] == [(0.5, 1)]
    end.handle(arrived(p.Received(header(Role.SENDER), 1)), 0.7)
    assert end.next_wakeup() == LEASE_S


def test_a_new_slice_does_not_postpone_the_repeat_of_an_old_one() -> None:
    _pair, end = reach(Role.SENDER, State.SENDING)
    end.handle(UnitsFinal(COMPUTE_ID, needed_of()[:1]), 0.0)
    end.handle(UnitsFinal(COMPUTE_ID, needed_of()[1:2]), 0.15)
    assert end.next_wakeup() == 0.2


def test_a_receiver_whose_bytes_do_not_come_asks_with_doubling() -> None:
    _pair, end = reach(Role.RECEIVER, State.LANDING)
    log = ticks_until(end, 5.0)
    asked = [(round(at, 3), m.number) for at, actions in log for m in messages(actions, p.Received)]
    assert asked == [(0.2, -1), (0.6, -1), (1.4, -1), (3.0, -1), (5.0, -1)]


def test_a_receiver_that_was_only_accepted_does_not_ask() -> None:
    _pair, end = reach(Role.RECEIVER, State.FETCHING)
    end.handle(arrived(p.Accepted(header(Role.RECEIVER), 0)), 0.1)
    assert end.next_wakeup() == DEADLINE_S


def test_a_sender_that_lets_go_after_done_does_not_leave_the_receiver_waiting() -> None:
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute()
    pair.finish_prompt()
    while pair.deliver_one():
        pass  # announced and DONE; no bytes have landed, and none will
    pair.jobs.clear()
    assert pair.sender.state is State.DECIDED
    pair.feed(pair.sender, CancelAsked("source changed"))
    pair.advance(1.0)
    assert pair.verdicts == [ReportFailed(reasons.UNKNOWN)]
    pair.check_invariants()


def test_a_repeated_slice_that_is_still_landing_is_answered_and_not_landed_again() -> None:
    pair, end = reach(Role.RECEIVER, State.LANDING)
    (action,) = pair.feed(end, arrived(slice_message()))
    assert action.message.number == -1


def test_ack_repeats_for_one_lease_and_no_longer() -> None:
    _pair, end = reach(Role.RECEIVER, State.VERIFIED)
    log = ticks_until(end, 1000.0)
    assert all(messages(actions, p.Ack) for _, actions in log[:-1])
    assert log[-1][0] == LEASE_S
    assert end.is_over


def test_a_landing_that_does_not_stop_keeps_the_report_waiting() -> None:
    _pair, end = reach(Role.RECEIVER, State.JOINING)
    assert end.next_wakeup() is None
    assert end.handle(LandingStopped(), 500.0)[0] == ReportFailed(reasons.LOST)


def test_ticks_before_their_time_do_nothing() -> None:
    for role, state in ((Role.SENDER, State.SENDING), (Role.RECEIVER, State.FETCHING)):
        pair, end = reach(role, state)
        assert pair.feed(end, Tick()) == []
