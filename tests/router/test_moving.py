"""The rules of a move at the router, one test each: who may move, who speaks, what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.cluster.router_harness import ListPlacer, make_lease, make_register, make_request, target

from disagg.router.attempt_events import (
    Action,
    Answered,
    ClientGone,
    Emit,
    Fail,
    MoveEnded,
    SendOrder,
    TimePassed,
    WorkerLost,
)
from disagg.router.emptying import MOVES_AT_ONCE, Emptying
from disagg.router.generation import GenerationEnd
from disagg.router.moving import MOVE_EVERY_S, MOVE_RETRY_S, MOVE_S, SINK_GRACE_S, MovableRequest
from disagg.router.registry import Registry, Worker
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    Grant,
    RequestFailed,
    Resume,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.purposes import HANDOFF, MOVE

ID, LEG = "c" * 32, "e" * 32


def make_movable(max_tokens: int = 20, boths: tuple[str, ...] = ("a", "b", "c"), **sampling: object) -> MovableRequest:
    """A request received at time 0."""
    return MovableRequest(
        make_request(max_tokens, **sampling),
        ID,
        lambda: ListPlacer(boths=boths),
        lambda *given: b"ticket",
        mint_leg=lambda leg, epoch, source, sink, count, ttl_s: f"{epoch}:{source}>{sink}:{count}".encode(),
        max_attempts=2,
        timeout_s=600.0,
        now=0.0,
    )


def answering(num_tokens: int = 3, **options: object) -> MovableRequest:
    """One that worker `a` answers."""
    request = make_movable(**options)  # type: ignore[arg-type]
    request.start(0.0)
    say(request, "a", Tokens(ID, 1, 0, tuple(range(num_tokens))))
    return request


def moving(**options: object) -> MovableRequest:
    request = answering(**options)  # type: ignore[arg-type]
    request.move(target("b"), LEG, 1.0)
    request.check_invariants()
    return request


def say(request: MovableRequest, source: str, message: object, now: float = 1.0) -> list[Action]:
    actions = request.handle(Answered(source, message), now)  # type: ignore[arg-type]
    request.check_invariants()
    return actions


def told(actions: list[Action]) -> list[tuple[object, ...]]:
    """Orders as (to, type, epoch), tokens as their ids, ends by type."""
    lines: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case SendOrder(to, message):
                lines.append((to, type(message), message.epoch))
            case Emit(GenerationEnd()):
                lines.append((GenerationEnd,))
            case Emit(chunk):
                lines.append(tuple(chunk.token_ids))
            case Fail(status):
                lines.append((Fail, status))
            case MoveEnded(outcome):
                lines.append((outcome,))
    return lines


def test_both_ends_are_told_at_once_and_the_sink_gets_what_the_router_has() -> None:
    request = answering()
    grant, dispatch = (
        action.message for action in request.move(target("b"), LEG, 1.0) if isinstance(action, SendOrder)
    )
    assert isinstance(grant, Grant)
    assert isinstance(dispatch, Dispatch)
    assert (grant.transfer_id, grant.request, grant.purpose, grant.sink) == (LEG, ID, MOVE, target("b"))
    assert grant.num_tokens == len(dispatch.first_output) == 3
    assert (dispatch.mode, dispatch.leg, dispatch.peer, dispatch.epoch) == ("move", LEG, target("a"), 2)
    assert dispatch.ticket == b"2:a>b:3"
    assert dispatch.deadline_s == grant.ttl_s == 599.0
    assert dispatch.age_s == 1.0


def test_the_source_is_heard_until_the_sink_speaks_and_then_no_more() -> None:
    request = moving()
    assert told(say(request, "a", Tokens(ID, 1, 3, (7,)))) == [(7,)]
    actions = say(request, "b", Tokens(ID, 2, 3, (7, 8)))
    assert told(actions) == [("a", CancelRequest, 1), ("moved",), (8,)]
    assert told(say(request, "a", Tokens(ID, 1, 4, (99,)))) == []
    assert told(say(request, "b", Tokens(ID, 2, 5, (9,)))) == [(9,)]
    assert request.server == "b"
    assert request.record.num_moves == 1


def test_a_sink_that_repeats_all_that_is_known_has_spoken_nevertheless() -> None:
    request = moving()
    assert told(say(request, "b", Tokens(ID, 2, 2, (2,)))) == [("a", CancelRequest, 1), ("moved",)]
    assert request.server == "b"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("a", TransferFailure(ID, 1, "lost")),
        ("b", TransferFailure(ID, 2, "digest")),
        ("b", RequestFailed(ID, 2, 400, "never fits")),
        ("b", Finished(ID, 2, 3, "stop")),
    ],
)
def test_whatever_ends_a_move_closes_the_sinks_epoch_and_only_then_resumes_the_source(
    source: str, word: object
) -> None:
    request = moving()
    assert told(say(request, source, word)) == [("b", CancelRequest, 2), ("failed",), ("a", Resume, 3)]
    assert told(say(request, "b", Tokens(ID, 2, 3, (99,)))) == []
    assert told(say(request, "a", Tokens(ID, 1, 3, (7,)))) == [(7,)], "said before it heard RESUME"
    assert told(say(request, "a", Tokens(ID, 3, 4, (8,)))) == [(8,)]
    assert told(say(request, "a", TransferFailure(ID, 1, "the second end says so too"))) == []
    assert request.record.num_moves == 0


def test_a_move_that_takes_too_long_is_ended() -> None:
    request = moving()
    assert told(request.handle(TimePassed(), 1.0 + MOVE_S - 0.1)) == []
    assert ("a", Resume, 3) in told(request.handle(TimePassed(), 1.0 + MOVE_S))


def test_a_lost_sink_resumes_the_source() -> None:
    request = moving()
    assert told(request.handle(WorkerLost("b", "killed"), 2.0)) == [("failed",), ("a", Resume, 3)]


def test_a_lost_source_waits_for_the_sink_which_may_have_the_answer() -> None:
    request = moving()
    assert told(request.handle(WorkerLost("a", "killed"), 2.0)) == []
    assert told(say(request, "b", Tokens(ID, 2, 3, (7,)), 2.1)) == [("moved",), (7,)]


@pytest.mark.parametrize("reported", [True, False])
def test_an_answer_whose_source_is_lost_before_the_sink_has_it_goes_on_as_after_any_death(reported: bool) -> None:
    request = moving()
    request.handle(WorkerLost("a", "killed"), 2.0)
    if reported:
        actions = say(request, "b", TransferFailure(ID, 2, "lost"), 2.1)
    else:
        actions = request.handle(TimePassed(), 2.0 + SINK_GRACE_S)
    assert told(actions) == [("b", CancelRequest, 2), ("failed",), ("b", Dispatch, 3)]
    assert request.record.num_continuations == 1


def test_an_answer_that_ends_at_its_source_ends() -> None:
    request = moving()
    assert told(say(request, "a", Finished(ID, 1, 3, "stop"))) == [
        ("b", CancelRequest, 2),
        ("finished",),
        (GenerationEnd,),
    ]
    assert request.is_over


def test_a_source_that_gives_the_answer_up_leaves_no_move_behind() -> None:
    request = moving()
    actions = told(say(request, "a", RequestFailed(ID, 1, 503, "out of room")))
    assert ("b", CancelRequest, 2) in actions
    assert not request.is_moving


def test_a_client_that_leaves_is_told_to_both_ends() -> None:
    request = moving()
    assert sorted(told(request.handle(ClientGone(), 1.5)), key=str) == [
        ("a", CancelRequest, 1),
        ("b", CancelRequest, 2),
        ("cancelled",),
    ]


def test_moves_and_resumes_count_neither_as_attempts_nor_as_continuations() -> None:
    request = answering()
    for number in range(4):  # twice the attempts that it has
        request.move(target("b"), LEG, 1.0 + 2 * number)
        say(request, "b", TransferFailure(ID, request.epoch, "no room"), 2.0 + 2 * number)
    assert request.epoch == 9
    assert told(request.handle(WorkerLost("a", "killed"), 30.0))[-1] == ("b", Dispatch, 10)
    assert request.record.num_continuations == 1


def test_a_request_moves_once_in_ten_seconds_unless_its_worker_drains() -> None:
    request = moving()
    say(request, "b", Tokens(ID, 2, 3, (7,)), 2.0)
    say(request, "b", Tokens(ID, 2, 4, (8,)), 2.0)
    assert not request.may_move(2.0 + MOVE_EVERY_S - 0.1, is_pressing=False)
    assert request.may_move(2.0 + MOVE_EVERY_S, is_pressing=False)
    assert request.may_move(2.1, is_pressing=True)


def test_a_move_that_failed_is_not_tried_again_at_once() -> None:
    request = moving()
    say(request, "b", TransferFailure(ID, 2, "no room"), 2.0)
    assert not request.may_move(2.0, is_pressing=True)
    assert request.may_move(2.0 + MOVE_RETRY_S, is_pressing=True)
    assert request.avoided_sink == "b"


@pytest.mark.parametrize("why", ["no token yet", "several answers", "about to end", "over", "moving"])
def test_only_one_answer_that_has_begun_and_goes_on_may_move(why: str) -> None:
    match why:
        case "no token yet":
            request = make_movable()
            request.start(0.0)
        case "several answers":
            request = answering(num_choices=2)
        case "about to end":
            request = answering(3, max_tokens=4)
        case "over":
            request = answering()
            request.handle(ClientGone(), 1.0)
        case _:
            request = moving()
    assert not request.may_move(1.0, is_pressing=True)


def test_what_has_no_token_is_placed_anew_when_its_worker_drains() -> None:
    request = make_movable()
    request.start(0.0)
    assert told(request.leave(1.0)) == [("a", CancelRequest, 1), ("b", Dispatch, 2)]
    assert answering().leave(1.0) == []
    alone = make_movable(boths=("a",))
    alone.start(0.0)
    assert alone.leave(1.0) == [], "there is no other place"


# --- which, and where to ------------------------------------------------------------------------------------

SERVES = {"sends": (HANDOFF, MOVE), "receives": (HANDOFF, MOVE)}


def fleet(*names: str, **others: dict[str, object]) -> Registry:
    """Workers that serve moves, each linked to all others."""
    registry = Registry()
    for name in names:
        registry.register(make_register(name, "both", **(SERVES | others.get(name, {}))), 0.0)  # type: ignore[arg-type]
        registry.renew(make_lease(name, links=[other for other in names if other != name]), 0.0)
    return registry


def worker(registry: Registry, name: str) -> Worker:
    found = registry.named(name)
    assert found is not None
    return found


def test_the_least_loaded_worker_that_serves_moves_takes_an_answer_over() -> None:
    registry = fleet("a", "b", "c", "old", old={"sends": None, "receives": None})
    registry.drain("a")
    emptying = Emptying(registry, {"b": 3, "c": 2}, lambda: LEG)
    sink = emptying.sink_for(worker(registry, "a"), "", 0.0)
    assert sink is worker(registry, "c")
    assert emptying.sink_for(worker(registry, "a"), "c", 0.0) is worker(registry, "b"), "where it failed last, last"


def test_few_answers_of_one_worker_move_at_once() -> None:
    registry = fleet("a", "b")
    registry.drain("a")
    requests = [answering() for _ in range(MOVES_AT_ONCE + 3)]
    emptying = Emptying(registry, {}, lambda: LEG)
    assert [r for r, actions in emptying.empty(lambda: requests, 1.0) if actions] == requests[:MOVES_AT_ONCE]
    assert not any(actions for _, actions in emptying.empty(lambda: requests, 1.1)), "until one of them has ended"


def test_without_a_worker_to_go_to_answers_stay_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = fleet("a")
    registry.drain("a")
    emptying = Emptying(registry, {}, lambda: LEG)
    for _ in range(3):
        assert not any(actions for _, actions in emptying.empty(lambda: [answering()], 1.0))
    assert caplog.text.count("finish where they are") == 1


def test_workers_that_drain_take_nothing_over() -> None:
    registry = fleet("a", "b")
    registry.drain("a")
    registry.drain("b")
    assert Emptying(registry, {}, lambda: LEG).sink_for(worker(registry, "a"), "", 0.0) is None


# --- a worker that is short of blocks -----------------------------------------------------------------------


def with_room(*names: str, **free: int) -> Registry:
    registry = fleet(*names)
    for name, count in free.items():
        registry.renew(replace(make_lease(name, links=names), blocks_used=(0, 10), blocks_free=(9, count)), 0.0)
    return registry


def relieved(registry: Registry, *requests: MovableRequest, now: float = 20.0) -> list[tuple[object, ...]]:
    emptying = Emptying(registry, {}, lambda: LEG)
    for found in registry:
        found.heard_at = now
    return [line for _, actions in emptying.relieve("a", requests, now) for line in told(actions)]


def test_an_answer_that_would_be_preempted_goes_to_a_worker_with_room() -> None:
    assert relieved(with_room("a", "b", "c", b=9, c=10), answering()) == [("a", Grant, 2), ("c", Dispatch, 2)]


def test_without_room_elsewhere_it_is_preempted_as_ever() -> None:
    assert relieved(with_room("a", "b", b=9), answering()) == []


def test_it_moves_no_more_often_than_any_answer_that_need_not() -> None:
    registry, request = with_room("a", "b", b=40), answering()
    request.move(target("b"), LEG, 1.0)
    say(request, "b", Tokens(ID, 2, 3, (7,)), 2.0)
    request.move(target("a"), LEG, 12.5)
    say(request, "a", Tokens(ID, 3, 4, (8,)), 13.0)
    assert relieved(registry, request, now=14.0) == []
    assert relieved(registry, request, now=13.0 + MOVE_EVERY_S) != []


def test_an_answer_that_is_elsewhere_by_now_is_left_alone() -> None:
    request = answering()
    request.move(target("b"), LEG, 1.0)
    say(request, "b", Tokens(ID, 2, 3, (7,)), 2.0)
    assert relieved(with_room("a", "b", "c", b=40, c=40), request) == []
