"""The first token waits for the prompt's log-probabilities, from the worker that computes it and by another way."""

from __future__ import annotations

import struct

import pytest
from support.cluster.router_harness import ListPlacer, make_attempts

from disagg.router.attempt import PREFILL_LOST_GRACE_S, RoutedRequest
from disagg.router.attempt_events import Action, Answered, Emit, Fail, SendOrder, TimePassed, WorkerLost
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.router.prompt_scores import ReportedScores
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.router import (
    Dispatch,
    Finished,
    PromptScores,
    RequestFailed,
    TransferFailure,
    TransferReport,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import StageTimes

ID = "t" * 32


def scores(start: int, count: int, epoch: int = 1) -> PromptScores:
    floats = struct.pack(f"<{count}f", *(-float(start + i) for i in range(count)))
    return PromptScores(ID, epoch, PromptLogprobs(start, floats, struct.pack(f"<{count}i", *[1] * count)))


def started(**options: object) -> RoutedRequest:
    placer = ListPlacer(["p0", "p1"], ["d0", "d1"])
    attempts = make_attempts(placer, num_prompt_logprobs=0, **options)  # type: ignore[arg-type]
    attempts.start(0.0)
    return attempts


def last(attempts: RoutedRequest) -> int:
    return len(attempts.request.prompt) - 1


def say(attempts: RoutedRequest, source: str, message: object, now: float = 1.0) -> list[Action]:
    actions = attempts.handle(Answered(source, message), now)  # type: ignore[arg-type]
    attempts.check_invariants()
    return actions


def logprobs_of(chunk: TokenChunk) -> list[float]:
    return [row.logprob for part in chunk.prompt_logprobs for _, row in part.rows()]


def test_tokens_that_come_first_wait_until_every_position_came() -> None:
    attempts = started()
    assert say(attempts, "d0", Tokens(ID, 1, 0, (5,))) == []
    assert say(attempts, "p0", scores(1, 1)) == []
    assert say(attempts, "d0", Tokens(ID, 1, 1, (6,))) == []
    assert say(attempts, "d0", Finished(ID, 1, 2, "length")) == []
    first, second, end = say(attempts, "p0", scores(2, last(attempts) - 1))
    assert isinstance(first, Emit)
    assert isinstance(first.item, TokenChunk)
    assert logprobs_of(first.item) == [-float(i) for i in range(1, last(attempts) + 1)]
    assert (second, end) == (Emit(TokenChunk(1, (6,))), Emit(GenerationEnd("length")))


def test_a_prompt_computed_anew_within_an_attempt_says_no_position_twice() -> None:
    attempts = started()
    for message in (scores(1, 2), scores(1, 1), scores(2, last(attempts) - 1)):
        say(attempts, "p0", message)
    ((emit,)) = say(attempts, "d0", Tokens(ID, 1, 0, (5,)))
    assert isinstance(emit, Emit)
    assert isinstance(emit.item, TokenChunk)
    assert logprobs_of(emit.item) == [-float(i) for i in range(1, last(attempts) + 1)]


def test_another_attempt_begins_with_no_scores() -> None:
    attempts = started()
    say(attempts, "p0", scores(1, last(attempts)))
    say(attempts, "d0", TransferFailure(ID, 1, "digest"))
    assert say(attempts, "p0", scores(1, last(attempts))) == []  # a late word of the first
    assert say(attempts, "d0", Tokens(ID, 2, 0, (5,))) == []
    assert len(say(attempts, "p1", scores(1, last(attempts), epoch=2))) == 1


@pytest.mark.parametrize("message", [scores(3, 1), scores(1, 100)], ids=["gap", "beyond the prompt"])
def test_wrong_positions_are_a_fault_of_the_worker(message: PromptScores) -> None:
    assert Fail in map(type, say(started(), "p0", message))


def test_scores_that_were_not_asked_for_are_a_fault() -> None:
    attempts = make_attempts(ListPlacer(["p0"], ["d0"]))
    attempts.start(0.0)
    assert Fail in map(type, say(attempts, "p0", scores(1, 1)))


def test_a_worker_alone_that_answers_without_scores_is_at_fault() -> None:
    attempts = started(max_tokens=1)
    assert Fail in map(type, say(attempts, "p0", Tokens(ID, 1, 0, (5,))))


@pytest.mark.parametrize("said", ["lost", "failed"])
def test_a_prefill_worker_gone_with_its_scores_begins_both_sides_anew(said: str) -> None:
    """The decode worker has the KV and answers, but no word of it may go out without the scores."""
    attempts = started()
    say(attempts, "d0", TransferReport(ID, 1, "d0", "shm", (), StageTimes()))
    assert say(attempts, "d0", Tokens(ID, 1, 0, (5,))) == []
    if said == "lost":
        attempts.handle(WorkerLost("p0", "killed"), 1.0)
        actions = attempts.handle(TimePassed(), 1.0 + PREFILL_LOST_GRACE_S)
    else:
        actions = say(attempts, "p0", RequestFailed(ID, 1, 503, "drained"))
    attempts.check_invariants()
    orders = [action.message for action in actions if isinstance(action, SendOrder)]
    dispatches = [order for order in orders if isinstance(order, Dispatch)]
    assert {(order.epoch, order.mode) for order in dispatches} == {(2, "prefill"), (2, "decode")}
    assert not any(isinstance(action, Emit | Fail) for action in actions)


def test_reported_scores_keep_every_position_once_in_any_cut() -> None:
    for cut in range(2, 9):
        reported = ReportedScores(10, 0)
        for message in (scores(1, cut - 1), scores(1, cut), scores(1, 9)):
            assert reported.add(message.scores) is None
        assert reported.is_complete
        rows = [row.logprob for part in reported.parts for _, row in part.rows()]
        assert rows == [-float(i) for i in range(1, 10)]
