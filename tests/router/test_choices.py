"""Several answers to one request: one attempt for all of them, a stream and an end for each."""

from __future__ import annotations

from support.cluster.router_harness import ListPlacer, make_attempts

from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import Action, Answered, ChoiceUnwanted, Emit, Fail, SendOrder, WorkerLost
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.wire.messages.router import (
    CancelChoice,
    CancelRequest,
    Dispatch,
    Finished,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens

ID = "t" * 32


def started(num_choices: int = 2, **options: object) -> RoutedRequest:
    placer = ListPlacer(["p0", "p1"], ["d0", "d1"])
    attempts = make_attempts(placer, num_choices=num_choices, **options)  # type: ignore[arg-type]
    orders = attempts.start(0.0)
    dispatches = [order.message for order in orders if isinstance(order, SendOrder)]
    assert all(isinstance(one, Dispatch) and one.sampling.num_choices == num_choices for one in dispatches)
    return attempts


def say(attempts: RoutedRequest, source: str, message: object) -> list[Action]:
    actions = attempts.handle(Answered(source, message), 1.0)  # type: ignore[arg-type]
    attempts.check_invariants()
    return actions


def tokens(choice: int, index: int, *ids: int, epoch: int = 1) -> Tokens:
    return Tokens(ID, epoch, index, ids, choice=choice)


def test_each_choice_has_indices_and_an_end_of_its_own() -> None:
    attempts = started()
    assert say(attempts, "d0", tokens(1, 0, 5)) == [Emit(TokenChunk(0, (5,), choice=1))]
    assert say(attempts, "d0", tokens(0, 0, 6)) == [Emit(TokenChunk(0, (6,)))]
    assert say(attempts, "d0", tokens(1, 0, 5, 7)) == [Emit(TokenChunk(1, (7,), choice=1))]
    assert say(attempts, "d0", Finished(ID, 1, 2, "length", choice=1)) == [Emit(GenerationEnd("length", choice=1))]
    assert not attempts.is_over
    assert say(attempts, "d0", Finished(ID, 1, 1, "stop", 6)) == [Emit(GenerationEnd("stop", 6))]
    assert attempts.is_over
    assert attempts.record.state == "finished"


def test_a_choice_that_was_not_asked_for_or_a_gap_in_one_is_a_fault() -> None:
    for message in (tokens(2, 0, 5), tokens(1, 1, 5), Finished(ID, 1, 1, "stop", choice=1)):
        assert Fail in map(type, say(started(), "d0", message))


def test_a_choice_that_the_client_has_enough_of_is_cancelled_alone() -> None:
    attempts = started(3)
    for choice in range(3):
        say(attempts, "d0", tokens(choice, 0, 5))
    assert attempts.handle(ChoiceUnwanted(1), 1.0) == [SendOrder("d0", CancelChoice(ID, 1, 1))]
    assert attempts.handle(ChoiceUnwanted(1), 1.0) == []
    assert say(attempts, "d0", tokens(1, 1, 6)) == []  # said before it heard
    assert say(attempts, "d0", tokens(1, 2, 6)) == []
    assert say(attempts, "d0", Finished(ID, 1, 3, "length", choice=1)) == []
    say(attempts, "d0", Finished(ID, 1, 1, "length", choice=0))
    say(attempts, "d0", Finished(ID, 1, 1, "length", choice=2))
    assert attempts.record.state == "finished"


def test_the_last_choice_called_off_cancels_the_request() -> None:
    attempts = started()
    say(attempts, "d0", tokens(0, 0, 5))
    say(attempts, "d0", tokens(1, 0, 5))
    attempts.handle(ChoiceUnwanted(0), 1.0)
    orders = [order.message for order in attempts.handle(ChoiceUnwanted(1), 1.0) if isinstance(order, SendOrder)]
    assert {type(order) for order in orders} == {CancelRequest}
    assert attempts.is_over


def test_before_any_choices_first_token_all_are_tried_again_and_after_one_they_go_on() -> None:
    attempts = started()
    retry = say(attempts, "d0", TransferFailure(ID, 1, "digest"))
    assert not any(isinstance(action, Fail) for action in retry)
    assert say(attempts, "d0", tokens(1, 0, 5, epoch=2)) == [Emit(TokenChunk(0, (5,), choice=1))]
    retry = attempts.handle(WorkerLost("d0", "killed"), 1.0)
    (order,) = [one for one in retry if isinstance(one, SendOrder) and isinstance(one.message, Dispatch)]
    assert isinstance(order.message, Dispatch)
    assert [(answer.choice, *answer.token_ids) for answer in order.message.output] == [(0,), (1, 5)]


def test_first_tokens_that_end_every_choice_come_from_the_prefill_worker() -> None:
    attempts = started()
    held = [tokens(0, 0, 5), Finished(ID, 1, 1, "stop", 5), tokens(1, 0, 6)]
    assert [say(attempts, "p0", word) for word in held] == [[], [], []]
    actions = say(attempts, "p0", Finished(ID, 1, 1, "stop", 6, choice=1))
    assert [action.item for action in actions if isinstance(action, Emit)] == [
        TokenChunk(0, (5,)),
        TokenChunk(0, (6,), choice=1),
        GenerationEnd("stop", 5),
        GenerationEnd("stop", 6, choice=1),
    ]
    assert attempts.record.state == "finished"
