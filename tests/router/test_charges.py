"""Which deaths a request is charged with, what two of them mean, and that a retry waits until it is known who died."""

from __future__ import annotations

from dataclasses import dataclass, field

from support.cluster.router_harness import ListPlacer, make_attempts

from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import Action, Answered, Fail, SendOrder, TimePassed, WorkerLost
from disagg.router.registry import PROOF_S
from disagg.transceiver.wire.messages.router import (
    YOUNG_TOKENS,
    Dispatch,
    PrefillLocally,
    RequestFailed,
    Retarget,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import Tokens

ID = "t" * 32


@dataclass
class Known:
    """What a test says is known of the workers."""

    steps: dict[str, set[str]] = field(default_factory=dict)
    signs: dict[str, float] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    def is_in_step(self, incarnation: str, transfer_id: str) -> bool:
        return transfer_id in self.steps.get(incarnation, ())

    def sign_at(self, incarnation: str) -> float | None:
        return self.signs.get(incarnation)

    def taken(self, transfer_id: str) -> frozenset[str]:
        return self.others


def started(known: Known, **placer: list[str]) -> tuple[RoutedRequest, ListPlacer]:
    names = {"prefills": ["p0", "p1", "p2"], "decodes": ["d0", "d1", "d2"]} | placer
    placing = ListPlacer(**names)
    attempts = make_attempts(placing, news=known, max_tokens=16)
    attempts.start(0.0)
    return attempts, placing


def lose(attempts: RoutedRequest, placer: ListPlacer, name: str, *, charged: bool, now: float = 1.0) -> list[Action]:
    placer.lose(name)
    return attempts.handle(WorkerLost(name, "killed", {ID: attempts.epoch} if charged else {}), now)


def sent(actions: list[Action], kind: type) -> list[str]:
    return [action.to for action in actions if isinstance(action, SendOrder) and isinstance(action.message, kind)]


def test_two_deaths_in_its_own_new_step_end_a_request_with_500_and_it_goes_nowhere() -> None:
    attempts, placer = started(Known())
    assert sent(lose(attempts, placer, "d0", charged=True), Dispatch) == ["p0", "d1"]
    actions = lose(attempts, placer, "d1", charged=True)
    (failure,) = [action for action in actions if isinstance(action, Fail)]
    assert failure.status == 500
    assert "workers `d0` and `d1` ended while they computed this request" in failure.message
    assert not sent(actions, Dispatch)
    assert attempts.is_over
    assert attempts.record.describe()["charged_deaths"] == ["d0", "d1"]
    attempts.check_invariants()


def test_a_bystander_is_retried_after_each_death_without_a_charge() -> None:
    attempts, placer = started(Known())
    for name, following in (("d0", "d1"), ("d1", "d2")):
        assert sent(lose(attempts, placer, name, charged=False), Dispatch) == ["p0", following]
    assert attempts.record.charged_deaths == ()
    assert not attempts.is_charged


def test_a_death_after_eight_tokens_is_not_charged() -> None:
    attempts, placer = started(Known())
    attempts.handle(Answered("d0", Tokens(ID, 1, 0, tuple(range(YOUNG_TOKENS)))), 0.5)
    lose(attempts, placer, "d0", charged=True)
    assert attempts.record.charged_deaths == ()


def test_the_death_of_an_earlier_attempt_s_worker_is_charged_when_it_is_heard_later() -> None:
    attempts, placer = started(Known())
    attempts.handle(Answered("d0", TransferFailure(ID, 1, "lost")), 0.1)  # nothing was known of p0's step
    assert attempts.epoch == 2
    placer.lose("p0")
    attempts.handle(WorkerLost("p0", "killed", {ID: 1}), 0.5)
    assert attempts.record.charged_deaths == ("p0",)
    assert not attempts.is_over


def test_a_retry_waits_until_the_worker_that_computed_the_request_is_lost_or_speaks() -> None:
    known = Known(steps={"p0": {ID}}, signs={"p0": 0.0})
    attempts, placer = started(known)
    assert attempts.handle(Answered("d0", TransferFailure(ID, 1, "lost")), 1.0) == []
    known.signs["p0"] = 1.0 + PROOF_S - 0.01
    assert attempts.handle(TimePassed(), 1.3) == [], "said before it could have died since"
    assert attempts.is_waiting
    attempts.check_invariants()
    known.signs.clear()
    known.steps.clear()
    placer.lose("p0")
    assert sent(attempts.handle(WorkerLost("p0", "killed", {ID: 1}), 1.4), Retarget) == ["d0"]
    assert attempts.record.charged_deaths == ("p0",)


def test_a_retry_goes_on_when_the_worker_that_computed_the_request_lives() -> None:
    known = Known(steps={"p0": {ID}}, signs={"p0": 0.0})
    attempts, _ = started(known)
    attempts.handle(Answered("d0", TransferFailure(ID, 1, "digest")), 1.0)
    known.signs["p0"] = 1.0 + PROOF_S
    assert sent(attempts.handle(TimePassed(), 1.5), Retarget) == ["d0"]
    assert not attempts.is_waiting


def test_two_prefill_workers_that_die_are_two_charges_though_the_decode_worker_speaks_first() -> None:
    known = Known(steps={"p0": {ID}, "p1": {ID}}, signs={"p0": 0.0, "p1": 0.0})
    attempts, placer = started(known)
    for epoch, name in ((1, "p0"), (2, "p1")):
        assert attempts.handle(Answered("d0", TransferFailure(ID, epoch, "lost")), float(epoch)) == []
        placer.lose(name)
        del known.signs[name]
        actions = attempts.handle(WorkerLost(name, "killed", {ID: epoch}), epoch + 0.3)
    assert [action.status for action in actions if isinstance(action, Fail)] == [500]
    assert not sent(actions, PrefillLocally), "a third worker"


def test_a_server_lost_while_the_retry_waits_has_the_request_placed_anew() -> None:
    known = Known(steps={"p0": {ID}}, signs={"p0": 0.0})
    attempts, placer = started(known)
    attempts.handle(Answered("d0", TransferFailure(ID, 1, "lost")), 1.0)
    lose(attempts, placer, "d0", charged=False, now=1.1)
    known.signs["p0"] = 2.0
    assert sent(attempts.handle(TimePassed(), 2.0), Dispatch) == ["p1", "d1"]
    attempts.check_invariants()


def test_a_charged_request_keeps_away_from_workers_that_serve_another_charged_one() -> None:
    known = Known()
    attempts, placer = started(known)
    known.others = frozenset({"d1", "p0"})
    assert sent(lose(attempts, placer, "d0", charged=True), Dispatch) == ["p1", "d2"]


def test_where_only_such_workers_are_left_it_waits_for_them() -> None:
    known = Known(others=frozenset({"d1"}))
    attempts, placer = started(known, decodes=["d0", "d1"])
    assert lose(attempts, placer, "d0", charged=True) == []
    assert attempts.is_waiting
    assert attempts.handle(TimePassed(), 1.5) == []
    known.others = frozenset()
    assert sent(attempts.handle(TimePassed(), 2.0), Dispatch) == ["p0", "d1"]
    attempts.check_invariants()


def test_a_request_that_waits_ends_at_its_deadline_with_all_it_held() -> None:
    known = Known(others=frozenset({"d1"}))
    attempts, placer = started(known, decodes=["d0", "d1"])
    lose(attempts, placer, "d0", charged=True)
    assert [action.status for action in attempts.handle(TimePassed(), 60.0) if isinstance(action, Fail)] == [504]
    assert not attempts.is_waiting
    attempts.check_invariants()


def test_a_worker_s_own_failure_is_no_death() -> None:
    attempts, _ = started(Known(steps={"d0": {ID}}, signs={"d0": 0.0}))
    assert sent(attempts.handle(Answered("d0", RequestFailed(ID, 1, 503, "no room")), 0.1), Dispatch) == ["p0", "d1"]
    assert attempts.record.charged_deaths == ()
