"""The attempt rules, one test each: what a request does next when something happens to it."""

from __future__ import annotations

import pytest
from support.cluster.router_harness import ListPlacer, make_attempts, target
from support.links.unchecked import raw

from disagg.router.attempt import PREFILL_LOST_GRACE_S, RoutedRequest
from disagg.router.attempt_events import (
    Action,
    Answered,
    ClientGone,
    Emit,
    Fail,
    RouterClosing,
    SendOrder,
    TimePassed,
    WorkerLost,
)
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.router.workload import Share
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    PrefillLocally,
    RequestFailed,
    Retarget,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import TokenLogprobs

ID = "t" * 32


def started(placer: ListPlacer | None = None, **options: object) -> RoutedRequest:
    attempts = make_attempts(placer or ListPlacer(["p0", "p1"], ["d0", "d1"]), **options)  # type: ignore[arg-type]
    attempts.start(0.0)
    attempts.check_invariants()
    return attempts


def say(attempts: RoutedRequest, source: str, message: object, now: float = 1.0) -> list[Action]:
    actions = attempts.handle(Answered(source, message), now)  # type: ignore[arg-type]
    attempts.check_invariants()
    return actions


def tokens(index: int, *ids: int, epoch: int = 1) -> Tokens:
    return raw(Tokens, ID, epoch, index, ids)


def summary(actions: list[Action]) -> list[tuple[object, ...]]:
    """Sends as (to, message type, epoch), failures as (Fail, status)."""
    lines: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case SendOrder(to, message):
                lines.append((to, type(message), message.epoch))
            case Fail(status):
                lines.append((Fail, status))
            case Emit(item):
                lines.append((type(item),))
    return lines


# --- dispatch -----------------------------------------------------------------------------------------------


def test_both_sides_are_dispatched_at_once_with_one_ticket() -> None:
    attempts = make_attempts(ListPlacer(["p0"], ["d0"]))
    prefill, decode = attempts.start(10.0)
    assert isinstance(prefill, SendOrder)
    assert isinstance(decode, SendOrder)
    assert isinstance(prefill.message, Dispatch)
    assert isinstance(decode.message, Dispatch)
    assert (prefill.to, prefill.message.mode, prefill.message.peer) == ("p0", "prefill", target("d0"))
    assert (decode.to, decode.message.mode, decode.message.peer) == ("d0", "decode", target("p0"))
    assert prefill.message.ticket == decode.message.ticket == b"1:p0>d0:50"
    assert prefill.message.deadline_s == 50.0
    assert prefill.message.epoch == 1
    assert prefill.message.prompt == attempts.request.prompt


def test_one_token_is_served_by_a_prefill_worker_alone() -> None:
    attempts = make_attempts(ListPlacer(["p0"], ["d0"]), max_tokens=1)
    (send,) = attempts.start(0.0)
    assert isinstance(send, SendOrder)
    assert isinstance(send.message, Dispatch)
    assert (send.to, send.message.mode, send.message.peer, send.message.ticket) == ("p0", "serve", None, b"")


def test_nobody_to_place_on_is_503_with_the_reason_and_retry_after() -> None:
    attempts = make_attempts(ListPlacer())
    assert attempts.start(0.0) == [Fail(503, "nobody is up", 2.0)]
    assert attempts.is_over
    attempts.check_invariants()


# --- tokens -------------------------------------------------------------------------------------------------


def test_what_was_cached_is_told_with_the_first_token_and_again_at_the_end() -> None:
    attempts = started()
    first = Tokens(ID, 1, 0, (5,), num_cached_tokens=2)
    assert say(attempts, "d0", first) == [Emit(TokenChunk(0, (5,), num_cached_tokens=2))]
    assert say(attempts, "d0", tokens(1, 6)) == [Emit(TokenChunk(1, (6,)))]
    assert say(attempts, "d0", Finished(ID, 1, 2, "stop", 6)) == [Emit(GenerationEnd("stop", 6, 2))]


@pytest.mark.parametrize("count", [-1, 10**6])
def test_more_cached_tokens_than_the_prompt_has_are_a_fault_of_the_worker(count: int) -> None:
    actions = say(started(), "d0", raw(Tokens, ID, 1, 0, (5,), num_cached_tokens=count))
    assert (Fail, 502) in summary(actions)


def test_tokens_are_forwarded_in_order_and_the_end_closes_both_sides() -> None:
    attempts = started()
    logprobs = (TokenLogprobs(-0.5), TokenLogprobs(-0.25))
    assert say(attempts, "d0", Tokens(ID, 1, 0, (5, 6), logprobs)) == [Emit(TokenChunk(0, (5, 6), logprobs))]
    assert say(attempts, "d0", tokens(2, 7)) == [Emit(TokenChunk(2, (7,)))]
    assert say(attempts, "d0", Finished(ID, 1, 3, "stop", 7)) == [Emit(GenerationEnd("stop", 7))]
    assert attempts.is_over
    assert attempts.record.state == "finished"


def test_repeated_tokens_are_dropped_and_overlaps_trimmed_with_their_logprobs() -> None:
    attempts = started()
    say(attempts, "d0", tokens(0, 5, 6))
    assert say(attempts, "d0", tokens(0, 5, 6)) == []
    overlap = Tokens(ID, 1, 1, (6, 7), (TokenLogprobs(-1.0), TokenLogprobs(-2.0)))
    assert say(attempts, "d0", overlap) == [Emit(TokenChunk(2, (7,), (TokenLogprobs(-2.0),)))]


@pytest.mark.parametrize(
    "message",
    [
        tokens(1, 5),
        tokens(-1, 5),
        tokens(0, 1, 2, 3, 4, 5),
        Tokens(ID, 1, 0, (1, 2), (TokenLogprobs(-1.0),)),
        Finished(ID, 1, 1, "stop"),
        Finished(ID, 1, 0, "because"),
    ],
    ids=["gap", "negative", "beyond max_tokens", "logprobs missing", "finished past a gap", "unknown reason"],
)
def test_a_fault_in_the_stream_is_502_and_cancels_everywhere(message: object) -> None:
    attempts = started()
    lines = summary(say(attempts, "d0", message))
    assert lines[0] == (Fail, 502)
    assert sorted(lines[1:], key=str) == [("d0", CancelRequest, 1), ("p0", CancelRequest, 1)]


@pytest.mark.parametrize("message", [tokens(0, 9), Finished(ID, 1, 0, "stop"), TransferFailure(ID, 1, "late")])
def test_messages_of_an_old_epoch_change_nothing(message: object) -> None:
    attempts = started()
    say(attempts, "d0", TransferFailure(ID, 1, "digest"))
    assert say(attempts, "d0", message) == []
    assert say(attempts, "p0", message) == []
    assert not attempts.is_over


def test_messages_of_a_worker_that_has_no_part_change_nothing() -> None:
    attempts = started()
    assert say(attempts, "d1", tokens(0, 9)) == []
    assert say(attempts, "d1", RequestFailed(ID, 1, 500, "no")) == []


def test_a_first_token_that_ends_the_answer_comes_from_prefill_and_cancels_decode() -> None:
    attempts = started()
    assert say(attempts, "p0", tokens(0, 5)) == []
    actions = say(attempts, "p0", Finished(ID, 1, 1, "stop", 5))
    assert actions == [
        Emit(TokenChunk(0, (5,))),
        SendOrder("d0", CancelRequest(ID, 1, "finished")),
        Emit(GenerationEnd("stop", 5)),
    ]
    assert attempts.is_over


def test_a_held_first_token_is_forgotten_when_its_worker_is_lost_before_finished() -> None:
    attempts = started()
    say(attempts, "p0", tokens(0, 5))
    attempts.handle(WorkerLost("p0", "killed"), 1.0)
    say(attempts, "d0", TransferFailure(ID, 1, "lost"))
    assert say(attempts, "d0", tokens(0, 6, epoch=2)) == [Emit(TokenChunk(0, (6,)))]


# --- transfer failures --------------------------------------------------------------------------------------


def test_a_failed_transfer_goes_to_another_prefill_worker_then_local_then_503() -> None:
    attempts = started(max_attempts=3)
    assert summary(say(attempts, "d0", TransferFailure(ID, 1, "digest"))) == [
        ("p0", CancelRequest, 1),
        ("p1", Dispatch, 2),
        ("d0", Retarget, 2),
    ]
    assert summary(say(attempts, "d0", TransferFailure(ID, 2, "digest"))) == [
        ("p1", CancelRequest, 2),
        ("d0", PrefillLocally, 3),
    ]
    actions = say(attempts, "d0", RequestFailed(ID, 3, 503, "no room"))
    assert summary(actions) == [(Fail, 503), ("d0", CancelRequest, 3)]
    assert isinstance(actions[0], Fail)
    assert actions[0].retry_after_s is not None


def test_the_ticket_of_a_retarget_admits_the_new_pair_and_epoch_for_what_time_is_left() -> None:
    attempts = started()
    _, dispatch, retarget = say(attempts, "d0", TransferFailure(ID, 1, "lost"), now=20.0)
    assert isinstance(dispatch, SendOrder)
    assert isinstance(retarget, SendOrder)
    assert isinstance(dispatch.message, Dispatch)
    assert retarget.message == Retarget(ID, 2, target("p1"), b"2:p1>d0:40")
    assert (dispatch.message.mode, dispatch.message.ticket, dispatch.message.deadline_s) == (
        "prefill",
        b"2:p1>d0:40",
        40.0,
    )


def test_a_failed_transfer_without_another_prefill_worker_is_computed_at_decode() -> None:
    attempts = started(ListPlacer(["p0"], ["d0"]))
    assert summary(say(attempts, "d0", TransferFailure(ID, 1, "lost"))) == [
        ("p0", CancelRequest, 1),
        ("d0", PrefillLocally, 2),
    ]
    assert say(attempts, "d0", tokens(0, 5, epoch=2)) == [Emit(TokenChunk(0, (5,)))]


def test_one_attempt_means_no_retry() -> None:
    attempts = started(max_attempts=1)
    actions = say(attempts, "d0", TransferFailure(ID, 1, "digest"))
    assert sorted(summary(actions), key=str) == sorted(
        [(Fail, 503), ("p0", CancelRequest, 1), ("d0", CancelRequest, 1)], key=str
    )
    assert isinstance(actions[0], Fail)
    assert "digest" in actions[0].message
    assert "1 of 1" in actions[0].message


def test_prefill_without_room_counts_as_a_failed_transfer() -> None:
    attempts = started()
    assert summary(say(attempts, "p0", RequestFailed(ID, 1, 503, "shutting down"))) == [
        ("p0", CancelRequest, 1),
        ("p1", Dispatch, 2),
        ("d0", Retarget, 2),
    ]


# --- losses -------------------------------------------------------------------------------------------------


def test_decode_lost_before_the_first_token_dispatches_both_sides_anew() -> None:
    attempts = started()
    actions = attempts.handle(WorkerLost("d0", "killed"), 1.0)
    attempts.check_invariants()
    assert summary(actions) == [("p0", CancelRequest, 1), ("p0", Dispatch, 2), ("d1", Dispatch, 2)]


def test_the_only_decode_worker_lost_is_503_and_names_it() -> None:
    attempts = started(ListPlacer(["p0"], ["d0"]))
    actions = attempts.handle(WorkerLost("d0", "killed"), 1.0)
    assert summary(actions) == [(Fail, 503), ("p0", CancelRequest, 1)]
    assert isinstance(actions[0], Fail)
    assert "`d0` was lost: killed" in actions[0].message
    assert actions[0].retry_after_s == 2.0


@pytest.mark.parametrize(
    "event",
    [
        WorkerLost("d0", "killed"),
        Answered("d0", RequestFailed(ID, 1, 503, "out of room")),
        Answered("d0", TransferFailure(ID, 1, "too late")),
    ],
    ids=["lost", "failed", "transfer failed"],
)
def test_nothing_is_retried_after_the_first_token_where_answers_do_not_go_on(event: WorkerLost | Answered) -> None:
    attempts = started(max_continuations=0)
    say(attempts, "d0", tokens(0, 5))
    lines = summary(attempts.handle(event, 2.0))
    assert lines[0] == (Fail, 502)
    assert all(kind is CancelRequest for _, kind, _ in lines[1:])
    assert attempts.is_over


def test_a_lost_prefill_worker_is_for_decode_to_report() -> None:
    attempts = started()
    assert attempts.handle(WorkerLost("p0", "killed"), 1.0) == []
    assert attempts.handle(TimePassed(), 1.0 + PREFILL_LOST_GRACE_S / 2) == []
    assert summary(say(attempts, "d0", TransferFailure(ID, 1, "lost"), 1.6)) == [
        ("p1", Dispatch, 2),
        ("d0", Retarget, 2),
    ]


def test_a_lost_prefill_worker_that_nobody_reports_is_replaced_after_a_grace() -> None:
    attempts = started()
    attempts.handle(WorkerLost("p0", "killed"), 1.0)
    assert summary(attempts.handle(TimePassed(), 1.0 + PREFILL_LOST_GRACE_S)) == [
        ("p1", Dispatch, 2),
        ("d0", Retarget, 2),
    ]


def test_prefill_lost_after_the_first_token_changes_nothing() -> None:
    attempts = started()
    say(attempts, "d0", tokens(0, 5))
    assert attempts.handle(WorkerLost("p0", "killed"), 1.0) == []
    assert attempts.handle(TimePassed(), 50.0) == []
    assert say(attempts, "d0", Finished(ID, 1, 1, "length"), 51.0) == [Emit(GenerationEnd("length"))]


# --- honest errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "other"), [("p0", "d0"), ("d0", "p0")])
@pytest.mark.parametrize(("said", "status"), [(400, 400), (500, 500), (200, 500)])
def test_a_failure_that_no_other_worker_would_mend_is_answered_at_once(
    source: str, other: str, said: int, status: int
) -> None:
    attempts = started()
    actions = say(attempts, source, RequestFailed(ID, 1, said, "why"))
    assert actions[0] == Fail(status, "why")
    assert (other, CancelRequest, 1) in summary(actions)


def test_the_client_going_away_cancels_everywhere_and_says_nothing() -> None:
    attempts = started()
    assert summary(attempts.handle(ClientGone(), 1.0)) == [("p0", CancelRequest, 1), ("d0", CancelRequest, 1)]
    assert attempts.record.state == "cancelled"
    assert attempts.handle(ClientGone(), 2.0) == []


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_the_deadline_is_504_before_and_after_the_first_token(num_tokens: int) -> None:
    attempts = started(timeout_s=5.0)
    if num_tokens:
        say(attempts, "d0", tokens(0, 5))
    assert attempts.handle(TimePassed(), 4.9) == []
    assert (Fail, 504) in summary(attempts.handle(TimePassed(), 5.0))


def test_a_closing_router_ends_the_request_with_503() -> None:
    assert (Fail, 503) in summary(started().handle(RouterClosing(), 1.0))


def test_load_counts_prefill_until_the_first_token_and_the_server_until_the_end() -> None:
    attempts = started()
    assert attempts.load == (Share("d0", num_answers=1), Share("p0", num_prompt_tokens=5))
    say(attempts, "d0", tokens(0, 5))
    assert attempts.load == (Share("d0", num_answers=1),)
    say(attempts, "d0", Finished(ID, 1, 1, "length"))
    assert attempts.load == ()


def test_a_first_token_of_an_abandoned_prefill_worker_never_ends_the_answer() -> None:
    attempts = started()
    say(attempts, "p0", tokens(0, 5))
    say(attempts, "d0", TransferFailure(ID, 1, "lost"))
    assert (Fail, 502) in summary(say(attempts, "p1", Finished(ID, 2, 1, "stop", 5)))
