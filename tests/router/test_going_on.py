"""What becomes of an answer whose worker is lost in the middle: it goes on elsewhere, with the client's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.cluster.router_harness import GEOMETRY, ListPlacer, make_attempts, make_lease, make_register, target

from disagg.router.attempt import PREFILL_LOST_GRACE_S, RoutedRequest
from disagg.router.attempt_events import (
    Action,
    Answered,
    ChoiceUnwanted,
    ClientGone,
    Emit,
    Fail,
    RouterClosing,
    SendOrder,
    TimePassed,
    WentOn,
    WorkerLost,
)
from disagg.router.choose import Fleet, Placement
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.router.going_on import GoingOn
from disagg.router.registry import Worker
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.router import (
    YOUNG_TOKENS,
    CancelRequest,
    Dispatch,
    Finished,
    PrefillLocally,
    PromptScores,
    RequestFailed,
    Retarget,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, Tokens
from disagg.transceiver.wire.purposes import SENDS

ID = "t" * 32
SCORES = PromptLogprobs(1, bytes(16), b"\1\0\0\0" * 4)
"""Of a prompt of five tokens."""


def started(*, prefills: str = "p0 p1", decodes: str = "d0 d1 d2", **options: Any) -> tuple[RoutedRequest, ListPlacer]:
    """A request of which the first decode worker gave tokens 5 and 6."""
    placer = ListPlacer(prefills.split(), decodes.split())
    attempts = make_attempts(placer, **({"max_tokens": 40} | options))
    attempts.start(0.0)
    say(attempts, "d0", tokens(0, 5, 6))
    return attempts, placer


def tokens(index: int, *ids: int, epoch: int = 1, choice: int = 0) -> Tokens:
    return Tokens(ID, epoch, index, ids, choice=choice)


def say(attempts: RoutedRequest, source: str, message: object, now: float = 1.0) -> list[Action]:
    actions = attempts.handle(Answered(source, message), now)  # type: ignore[arg-type]
    attempts.check_invariants()
    return actions


def lose(attempts: RoutedRequest, placer: ListPlacer, name: str, *, in_step: int = 0, now: float = 1.0) -> list[Action]:
    """`in_step`: the epoch under which the request was new in the worker's last step."""
    placer.lose(name)
    actions = attempts.handle(WorkerLost(name, "killed", {ID: in_step} if in_step else {}), now)
    attempts.check_invariants()
    return actions


def dispatches(actions: list[Action]) -> dict[str, Dispatch]:
    return {a.to: a.message for a in actions if isinstance(a, SendOrder) and isinstance(a.message, Dispatch)}


def kinds(actions: list[Action]) -> list[tuple[str, type]]:
    return [(action.to, type(action.message)) for action in actions if isinstance(action, SendOrder)]


def status(actions: list[Action]) -> list[int]:
    return [action.status for action in actions if isinstance(action, Fail)]


def emitted(actions: list[Action]) -> list[int]:
    chunks = [action.item for action in actions if isinstance(action, Emit) and isinstance(action.item, TokenChunk)]
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


# --- death between tokens -----------------------------------------------------------------------------------


def test_an_answer_goes_on_at_another_pair_with_the_prompt_as_it_was_and_its_tokens_apart() -> None:
    attempts, placer = started()
    found = dispatches(lose(attempts, placer, "d0"))
    assert set(found) == {"p0", "d1"}
    for dispatch in found.values():
        assert dispatch.prompt == attempts.request.prompt
        assert [(answer.choice, list(answer.token_ids)) for answer in dispatch.output] == [(0, [5, 6])]
        assert dispatch.sampling == attempts.request.sampling
        assert (dispatch.epoch, dispatch.ticket) == (2, b"2:p0>d1:59,5,6")
    assert found["d1"].num_known == len(attempts.request.prompt) + 2


def test_the_client_s_tokens_continue_without_a_gap_or_a_repeat_and_end_whole() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert say(attempts, "d1", tokens(2, 7, epoch=2)) == [WentOn(0, is_exact=True), Emit(TokenChunk(2, (7,)))]
    assert say(attempts, "d1", tokens(3, 8, epoch=2)) == [Emit(TokenChunk(3, (8,)))]
    assert say(attempts, "d1", Finished(ID, 2, 4, "stop", 8)) == [Emit(GenerationEnd("stop", 8))]
    assert attempts.record.state == "finished"
    described = attempts.record.describe()
    assert described["continuations"] == 1
    assert [attempt["tokens_before"] for attempt in described["attempts"]] == [0, 2]
    assert described["seeds"] == [7]


@pytest.mark.parametrize(
    ("index", "ids", "sent"),
    [(1, (6, 7), [7]), (0, (5, 6), []), (2, (7, 8), [7, 8])],
    ids=["begins one early", "says only what is known", "begins where it should"],
)
def test_a_token_that_the_client_has_is_not_sent_again(index: int, ids: tuple[int, ...], sent: list[int]) -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert emitted(say(attempts, "d1", tokens(index, *ids, epoch=2))) == sent


def test_a_worker_that_leaves_a_token_out_is_at_fault() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert status(say(attempts, "d1", tokens(3, 8, epoch=2))) == [502]


def test_what_the_lost_worker_said_late_changes_nothing() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert say(attempts, "d0", tokens(2, 99)) == []
    assert say(attempts, "d0", Finished(ID, 1, 2, "length")) == []
    assert attempts.next_chunk("d0", tokens(2, 99), 1.0) is None
    assert attempts.next_chunk("d1", tokens(2, 7, epoch=2), 1.0) is None, (
        "the first token of an attempt is no plain one"
    )


def test_a_worker_that_gives_up_with_503_in_the_middle_is_left_for_another() -> None:
    attempts, _ = started()
    actions = say(attempts, "d0", RequestFailed(ID, 1, 503, "leaving"))
    assert kinds(actions) == [("p0", CancelRequest), ("d0", CancelRequest), ("p0", Dispatch), ("d1", Dispatch)]


@pytest.mark.parametrize("said", [400, 500])
def test_a_failure_of_the_request_itself_ends_it_in_the_middle_too(said: int) -> None:
    attempts, _ = started()
    assert status(say(attempts, "d0", RequestFailed(ID, 1, said, "not finite"))) == [said]


def test_the_prefill_worker_counts_as_loaded_until_the_answer_goes_on() -> None:
    attempts, placer = started()
    assert [share.incarnation for share in attempts.load] == ["d0"]
    lose(attempts, placer, "d0")
    assert [share.incarnation for share in attempts.load] == ["d1", "p0"]
    say(attempts, "d1", tokens(2, 7, epoch=2))
    assert [share.incarnation for share in attempts.load] == ["d1"]


def test_what_was_cached_and_the_prompt_s_log_probabilities_are_those_of_the_first_attempt() -> None:
    placer = ListPlacer(["p0"], ["d0", "d1"])
    attempts = make_attempts(placer, max_tokens=40, num_prompt_logprobs=0)
    attempts.start(0.0)
    say(attempts, "p0", PromptScores(ID, 1, SCORES))
    (first,) = say(attempts, "d0", Tokens(ID, 1, 0, (5,), num_cached_tokens=3))
    assert first == Emit(TokenChunk(0, (5,), (), 3, (SCORES,)))
    found = dispatches(lose(attempts, placer, "d0"))
    assert [dispatch.sampling.num_prompt_logprobs for dispatch in found.values()] == [None, None]
    say(attempts, "d1", Tokens(ID, 2, 1, (6,), num_cached_tokens=0))
    assert say(attempts, "d1", Finished(ID, 2, 2, "stop", 6)) == [Emit(GenerationEnd("stop", 6, 3))]


# --- at either end of the answer ----------------------------------------------------------------------------


def test_before_the_first_token_nothing_is_apart() -> None:
    placer = ListPlacer(["p0"], ["d0", "d1"])
    attempts = make_attempts(placer)
    attempts.start(0.0)
    found = dispatches(lose(attempts, placer, "d0"))
    assert all(not dispatch.output for dispatch in found.values())
    assert attempts.record.num_continuations == 0


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"max_tokens": 2}, GenerationEnd("length")),
        ({"stop_token_ids": (6,)}, GenerationEnd("stop", 6)),
        ({"eos_token_ids": (6,)}, GenerationEnd("stop", 6)),
    ],
)
def test_an_answer_whose_last_token_came_ends_whole_though_nobody_said_so(
    options: dict[str, Any], end: GenerationEnd
) -> None:
    attempts, placer = started(**options)
    actions = lose(attempts, placer, "d0")
    assert actions[0] == Emit(end)
    assert kinds(actions) == [("p0", CancelRequest)], "whose source may not have been released yet"
    assert attempts.record.state == "finished"


@pytest.mark.parametrize(
    "options", [{"eos_token_ids": (6,), "ignore_eos": True}, {"stop_token_ids": (6,), "min_tokens": 3}]
)
def test_a_token_that_ends_nothing_is_followed_by_others(options: dict[str, Any]) -> None:
    attempts, placer = started(**options)
    assert set(dispatches(lose(attempts, placer, "d0"))) == {"p0", "d1"}


def test_one_token_that_is_left_is_computed_by_a_prefill_worker_without_a_transfer() -> None:
    attempts, placer = started(max_tokens=3)
    found = dispatches(lose(attempts, placer, "d0"))
    assert [(name, dispatch.mode) for name, dispatch in found.items()] == [("p0", "serve")]
    assert emitted(say(attempts, "p0", tokens(2, 7, epoch=2))) == [7]
    assert say(attempts, "p0", Finished(ID, 2, 3, "length")) == [Emit(GenerationEnd("length"))]


def test_a_token_that_ends_the_answer_comes_from_the_prefill_worker_of_the_continuation() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert say(attempts, "p0", tokens(2, 9, epoch=2)) == []
    actions = say(attempts, "p0", Finished(ID, 2, 3, "stop", 9))
    assert emitted(actions) == [9]
    assert kinds(actions) == [("d1", CancelRequest)]
    assert actions[-1] == Emit(GenerationEnd("stop", 9))


# --- during the continuation --------------------------------------------------------------------------------


def test_a_second_decode_worker_that_dies_before_it_spoke_is_another_continuation() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    actions = lose(attempts, placer, "d1")
    assert kinds(actions) == [("p0", CancelRequest), ("p0", Dispatch), ("d2", Dispatch)]
    assert attempts.record.num_continuations == 2


def test_each_death_finds_the_tokens_that_came_since() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    say(attempts, "d1", tokens(2, 7, epoch=2))
    assert list(dispatches(lose(attempts, placer, "d1"))["d2"].output[0].token_ids) == [5, 6, 7]
    assert emitted(say(attempts, "d2", tokens(3, 8, epoch=3))) == [8]


def test_a_failed_transfer_of_a_continuation_goes_to_another_prefill_worker_and_then_to_the_decode_worker() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    actions = say(attempts, "d1", TransferFailure(ID, 2, "lost"))
    assert kinds(actions) == [("p0", CancelRequest), ("p1", Dispatch), ("d1", Retarget)]
    assert list(dispatches(actions)["p1"].output[0].token_ids) == [5, 6]
    assert kinds(say(attempts, "d1", TransferFailure(ID, 3, "lost"))) == [("p1", CancelRequest), ("d1", PrefillLocally)]
    assert emitted(say(attempts, "d1", tokens(2, 7, epoch=4))) == [7]
    assert attempts.record.num_continuations == 1


def test_a_prefill_worker_lost_in_the_continuation_is_replaced_as_before_the_first_token() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert lose(attempts, placer, "p0") == []
    actions = attempts.handle(TimePassed(), 1.0 + PREFILL_LOST_GRACE_S)
    assert kinds(actions) == [("p1", Dispatch), ("d1", Retarget)]


def test_a_worker_that_moves_no_kv_in_the_middle_of_an_answer_is_at_fault() -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    say(attempts, "d1", tokens(2, 7, epoch=2))
    assert status(say(attempts, "d1", TransferFailure(ID, 2, "late"))) == [502]


def test_without_a_pair_a_decode_worker_computes_the_prompt_and_the_answer_itself() -> None:
    attempts, placer = started(prefills="p0", decodes="d0 d1")
    placer.lose("p0")
    found = dispatches(lose(attempts, placer, "d0"))
    assert [(name, dispatch.mode) for name, dispatch in found.items()] == [("d1", "serve")]


# --- limits -------------------------------------------------------------------------------------------------


def test_without_a_worker_to_go_on_at_the_answer_ends_with_an_error_that_says_so() -> None:
    attempts, placer = started(decodes="d0")
    failure, *_ = lose(attempts, placer, "d0")
    assert failure == Fail(502, "worker `d0` was lost: killed; nobody is up (0 of 8 continuations used)")


def test_continuations_are_counted_and_the_last_one_is_the_last() -> None:
    attempts, placer = started(max_continuations=1)
    lose(attempts, placer, "d0")
    say(attempts, "d1", tokens(2, 7, epoch=2))
    failure, *_ = lose(attempts, placer, "d1")
    assert failure == Fail(502, "worker `d1` was lost: killed (1 of 1 continuations used)")


def test_attempts_before_the_first_token_do_not_count_among_continuations_nor_these_among_them() -> None:
    placer = ListPlacer(["p0"], ["d0", "d1", "d2"])
    attempts = make_attempts(placer, max_attempts=2, max_continuations=1, max_tokens=40)
    attempts.start(0.0)
    lose(attempts, placer, "d0")
    say(attempts, "d1", tokens(0, 5, epoch=2))
    assert set(dispatches(lose(attempts, placer, "d1"))) == {"p0", "d2"}


def test_deaths_in_the_middle_of_an_answer_are_not_charged_to_it() -> None:
    attempts, placer = started(decodes="d0 d1 d2 d3 d4")
    say(attempts, "d0", tokens(2, *range(YOUNG_TOKENS)))
    for epoch, name in enumerate(("d0", "d1", "d2"), start=1):
        lose(attempts, placer, name, in_step=epoch)
        say(attempts, f"d{epoch}", tokens(attempts.num_tokens, *range(YOUNG_TOKENS), epoch=epoch + 1))
    assert attempts.record.charged_deaths == ()
    assert not attempts.is_over


def test_a_request_that_ends_two_workers_in_its_first_steps_there_walks_no_further() -> None:
    attempts, placer = started()
    say(attempts, "d0", tokens(2, *range(YOUNG_TOKENS)))
    lose(attempts, placer, "d0")
    lose(attempts, placer, "d1", in_step=2)
    assert attempts.is_charged
    assert status(lose(attempts, placer, "d2", in_step=3)) == [500]
    assert attempts.record.charged_deaths == ("d1", "d2")


@pytest.mark.parametrize("epoch", [-1, 9])
def test_an_epoch_that_never_was_charges_nobody(epoch: int) -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0", in_step=epoch)
    assert attempts.record.charged_deaths == ()


# --- clients, clocks and the router -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "state"), [(ClientGone(), "cancelled"), (RouterClosing(), "failed"), (ChoiceUnwanted(0), "cancelled")]
)
def test_a_continuation_that_nobody_waits_for_is_cancelled_at_both_ends(event: Any, state: str) -> None:
    attempts, placer = started()
    lose(attempts, placer, "d0")
    assert sorted(kinds(attempts.handle(event, 2.0))) == [("d1", CancelRequest), ("p0", CancelRequest)]
    attempts.check_invariants()
    assert attempts.record.state == state


def test_a_death_after_the_client_left_dispatches_nothing() -> None:
    attempts, placer = started()
    attempts.handle(ClientGone(), 1.0)
    assert lose(attempts, placer, "d0") == []


def test_the_deadline_is_that_of_the_request_and_passes_in_a_continuation_too() -> None:
    attempts, placer = started(timeout_s=5.0)
    assert dispatches(lose(attempts, placer, "d0", now=4.0))["d1"].deadline_s == 1.0
    assert status(attempts.handle(TimePassed(), 5.0)) == [504]
    attempts.check_invariants()


# --- several answers ----------------------------------------------------------------------------------------


def test_several_answers_go_on_at_one_worker_and_those_that_are_over_stay_so() -> None:
    attempts, placer = started(num_choices=3)
    say(attempts, "d0", tokens(0, 8, 9, choice=1))
    say(attempts, "d0", Finished(ID, 1, 2, "stop", 9, 1))
    found = dispatches(lose(attempts, placer, "d0"))
    assert [(name, dispatch.mode) for name, dispatch in found.items()] == [("d1", "serve")]
    assert [(a.choice, list(a.token_ids)) for a in found["d1"].output] == [(0, [5, 6]), (2, [])]
    assert say(attempts, "d1", tokens(2, 7, epoch=2))[0] == WentOn(0, is_exact=True)
    assert emitted(say(attempts, "d1", tokens(0, 4, epoch=2, choice=2))) == [4]
    for choice, count in ((0, 3), (2, 1)):
        say(attempts, "d1", Finished(ID, 2, count, "length", None, choice))
    assert attempts.record.state == "finished"


def test_the_output_of_a_dispatch_is_what_it_may_be() -> None:
    attempts, placer = started(num_choices=2)
    (dispatch,) = dispatches(lose(attempts, placer, "d0")).values()
    for wrong in (
        {"output": (ChoiceOutput(1, ()), ChoiceOutput(0, ()))},
        {"output": (ChoiceOutput(2, ()),)},
        {"output": (ChoiceOutput(0, tuple(range(40))),)},
        {"mode": "decode"},
    ):
        with pytest.raises(ValueError, match="output"):
            replace(dispatch, **wrong)


# --- equal formats ------------------------------------------------------------------------------------------


def worker(name: str, role: str, kv_dtype: str = "float32", *, is_old: bool = False) -> Worker:
    slot_nbytes = tuple(nbytes * {"float32": 4, "float16": 2}[kv_dtype] // 4 for nbytes in GEOMETRY.slot_nbytes)
    geometry = replace(GEOMETRY, kv_dtype=kv_dtype, slot_nbytes=slot_nbytes)
    register = make_register(name, role, geometry=geometry, sends=None if is_old else SENDS[role])
    return Worker(register, make_lease(name, links=("p0", "p1")), 0.0)


def routed(*workers: Worker) -> tuple[RoutedRequest, list[Worker]]:
    live = list(workers)
    placer = lambda: Fleet(live, 0.0, {})  # noqa: E731
    attempts = make_attempts(placer(), max_tokens=40)  # type: ignore[arg-type]
    attempts._places._placer = placer
    attempts.start(0.0)
    return attempts, live


def lose_live(attempts: RoutedRequest, live: list[Worker], name: str) -> dict[str, Dispatch]:
    live[:] = [one for one in live if one.incarnation != name]
    return dispatches(attempts.handle(WorkerLost(name, "killed"), 1.0))


def test_workers_that_store_kv_alike_come_first_though_others_are_less_loaded() -> None:
    attempts, live = routed(worker("p0", "prefill"), worker("d0", "decode"))
    live += [worker("d1", "decode", "float16"), worker("d2", "decode")]
    say(attempts, "d0", tokens(0, 5))
    assert set(lose_live(attempts, live, "d0")) == {"p0", "d2"}
    assert attempts.record.current.is_exact


def test_an_answer_goes_on_inexact_where_nothing_alike_is_left_and_that_is_told() -> None:
    attempts, live = routed(worker("p0", "prefill"), worker("d0", "decode"))
    live.append(worker("d1", "decode", "float16"))
    say(attempts, "d0", tokens(0, 5))
    assert set(lose_live(attempts, live, "d0")) == {"p0", "d1"}
    assert say(attempts, "d1", tokens(1, 6, epoch=2))[0] == WentOn(0, is_exact=False)
    assert not attempts.record.describe()["attempts"][1]["exact"]


def test_a_history_of_two_formats_is_never_exact_again() -> None:
    half = worker("d0", "decode", "float16").target
    going_on = GoingOn(8)
    assert going_on.is_exact(Placement(target("d0")))
    going_on.note(Placement(half, worker("p0", "prefill").target))
    assert going_on.only_format is None
    assert not going_on.is_exact(Placement(half, worker("p0", "prefill").target))


def test_a_worker_of_an_older_release_is_not_asked_to_go_on() -> None:
    attempts, live = routed(worker("p0", "prefill"), worker("d0", "decode"))
    live.append(worker("d1", "decode", is_old=True))
    say(attempts, "d0", tokens(0, 5))
    assert lose_live(attempts, live, "d0") == {}
    assert attempts.record.state == "failed"


def test_a_first_attempt_is_exact_whatever_its_workers_store() -> None:
    attempts, _ = routed(worker("p0", "prefill"), worker("d0", "decode", "float16"))
    assert attempts.record.current.is_exact
