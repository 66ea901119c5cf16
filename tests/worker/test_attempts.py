"""What the attempts of a registration still owe the engine when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.model.engine_pair import key

from disagg.engine.commands import (
    AttemptKey,
    Decode,
    DropChoice,
    FailedEvent,
    FinishedEvent,
    Prefill,
    PressedEvent,
    PromptComputedEvent,
    Release,
    Reserve,
    Serve,
    TokensEvent,
    Unregister,
)
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.actions import ReportFailed, Verified
from disagg.transceiver.wire.messages.router import (
    CancelChoice,
    CancelRequest,
    Dispatch,
    Finished,
    PeerTarget,
    PrefillLocally,
    RequestFailed,
    Retarget,
)
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, Tokens
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState, UnitName
from disagg.worker.attempts import Attempts
from disagg.worker.metrics import WorkerMetrics


def test_numbers_that_saturated_stay_counted_when_their_transfer_and_its_link_are_gone() -> None:
    metrics = WorkerMetrics(["full"])
    attempts = Attempts(lambda command: None, lambda message: None, None, metrics, fetch_wait_s=1.0)  # type: ignore[arg-type]
    for number in (1, 2):
        attempts.free_reservation(key(number), "cancelled", TransferRecord(plane="tcp", num_saturated=3))
    name = "disagg_kv_saturated_total", (("at", "landed"),)
    assert metrics._counters[name] == 6


def test_an_attempt_that_is_over_is_held_until_its_suspect_blocks_were_looked_at() -> None:
    commands: list[Any] = []
    metrics: Any = SimpleNamespace(count_digest_failure=lambda count: None)
    attempts = Attempts(commands.append, lambda message: None, None, metrics, fetch_wait_s=1.0)  # type: ignore[arg-type]
    attempts.unregister(key(1), [UnitName(0, 3)])
    attempts.release_source(key(1), "cancelled")
    assert attempts.keys == ()
    assert attempts.held == (key(1),)
    assert commands == [Unregister(key(1), (UnitName(0, 3),))]
    attempts.suspects_seen(key(1))
    assert attempts.held == ()
    assert commands[1:] == [Release(key(1))]


def test_a_received_first_token_leaves_when_it_is_verified_and_only_once() -> None:
    commands: list[Any] = []
    messages: list[Any] = []
    metrics: Any = SimpleNamespace(count_transfer=lambda *counts: None, count_refused=lambda *names: None)
    pairing: Any = lambda dispatch: SimpleNamespace(  # noqa: E731
        fits=True, precision="", worker_id="d", group_bytes=lambda record: (), peer_geometry=None
    )
    attempts = Attempts(commands.append, messages.append, pairing, metrics, fetch_wait_s=1.0)
    attempts.receiving = cast(Any, SimpleNamespace(knows=lambda key: False))
    transfer_id, epoch = key(1).transfer_id, key(1).epoch
    attempts.take_message(Dispatch(transfer_id, epoch, "r", "decode", (1, 2), Sampling(max_tokens=2), 60.0))
    first = FirstToken(7, None, SamplingState(0, ((7, 1),)), num_cached_tokens=1)
    attempts.decode(key(1), Verified(transfer_id, epoch, first), TransferRecord(plane="tcp"))
    assert [type(command) for command in commands] == [Reserve, Decode]
    assert messages[-1] == Tokens(transfer_id, epoch, 0, (7,), (), 1), "the engine has not been asked yet"
    sent = len(messages)
    attempts.take_event(TokensEvent(key(1), 0, (7,), (), 1))
    attempts.take_event(TokensEvent(key(1), 1, (9,), ()))
    assert messages[sent:] == [Tokens(transfer_id, epoch, 1, (9,), ())]


def test_a_request_that_the_engine_gave_up_is_answered_with_the_engines_status_and_words() -> None:
    messages: list[Any] = []
    metrics: Any = SimpleNamespace()
    pairing: Any = lambda dispatch: SimpleNamespace()  # noqa: E731
    attempts = Attempts(lambda command: None, messages.append, pairing, metrics, fetch_wait_s=1.0)
    for number in (1, 2):
        transfer_id, epoch = key(number).transfer_id, key(number).epoch
        attempts.take_message(Dispatch(transfer_id, epoch, "r", "serve", (1,), Sampling(max_tokens=1), 60.0))
    attempts.take_event(FailedEvent(key(1), 500, "sampling after position 0 failed: ZeroDivisionError: why"))
    expected = "sampling after position 0 failed: ZeroDivisionError: why"
    assert messages == [RequestFailed(key(1).transfer_id, key(1).epoch, 500, expected)]
    assert attempts.keys == (key(2),)


# --- answers that go on -------------------------------------------------------------------------------------


class NoTransfers(set[AttemptKey]):
    """A side of transfers that never hold anything."""

    def knows(self, key: AttemptKey) -> bool:
        return False

    def start(self, *given: object) -> None: ...

    def feed(self, *given: object) -> None: ...

    def reach(self, *given: object) -> None: ...


class Worker:
    """Attempts with what they told the engine and the router."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.messages: list[Any] = []
        metrics: Any = SimpleNamespace(count_transfer=lambda *counts: None, count_landed_saturated=lambda count: None)
        pairing: Any = lambda dispatch: SimpleNamespace(  # noqa: E731
            fits=True, precision="", worker_id="d", group_bytes=lambda record: (), sender=lambda: None
        )
        self.attempts = Attempts(self.commands.append, self.messages.append, pairing, metrics, fetch_wait_s=1.0)
        self.attempts.receiving = self.attempts.sending = cast(Any, NoTransfers())

    def dispatch(self, mode: str, *output: ChoiceOutput, num_choices: int = 1) -> None:
        sampling, peer = Sampling(max_tokens=9, seed=3, num_choices=num_choices), None if mode == "serve" else PEER
        self.attempts.take_message(Dispatch(ID, 2, "r", mode, (1, 2), sampling, 60.0, peer, output=output))


ID = key(1).transfer_id
PEER = PeerTarget("p" * 32, "p", "tcp://127.0.0.1:1")
HAD = ChoiceOutput(0, (5, 6))


def test_each_side_of_a_continuation_computes_or_reserves_what_the_client_has() -> None:
    for mode, kind in (("serve", Serve), ("prefill", Prefill), ("decode", Reserve)):
        worker = Worker()
        worker.dispatch(mode, HAD)
        (command,) = worker.commands
        assert isinstance(command, kind)
        assert (command.prompt, command.output) == ((1, 2), (5, 6))


def test_a_received_continuation_s_first_token_follows_what_the_client_has() -> None:
    worker = Worker()
    worker.dispatch("decode", HAD)
    first = FirstToken(7, None, SamplingState(0, ((7, 1),)), num_cached_tokens=1)
    attempt = AttemptKey(ID, 2)
    worker.attempts.decode(attempt, Verified(ID, 2, first), TransferRecord(plane="tcp"))
    assert worker.messages[-1] == Tokens(ID, 2, 2, (7,)), "what was cached of it is no news to the client"
    worker.attempts.take_event(TokensEvent(attempt, 2, (7,), ()))
    worker.attempts.take_event(TokensEvent(attempt, 3, (8,), ()))
    assert worker.messages[-1] == Tokens(ID, 2, 3, (8,))
    assert worker.messages.count(Tokens(ID, 2, 2, (7,))) == 1


def test_a_continuation_that_its_next_token_ends_is_told_by_the_prefill_worker_at_the_right_index() -> None:
    worker = Worker()
    worker.dispatch("prefill", HAD)
    first = FirstToken(7, None, SamplingState(0, ((7, 1),)))
    worker.attempts.take_event(PromptComputedEvent(AttemptKey(ID, 2), 0, first, finished=True, stop_token_id=7))
    assert worker.messages[-2:] == [Tokens(ID, 2, 2, (7,)), Finished(ID, 2, 3, "stop", 7)]


@pytest.mark.parametrize(
    ("order", "kind"),
    [(Retarget(ID, 3, PEER, b""), Reserve), (PrefillLocally(ID, 3), Serve)],
    ids=["retarget", "local"],
)
def test_a_continuation_whose_transfer_failed_is_tried_again_with_what_the_client_has(order: Any, kind: type) -> None:
    worker = Worker()
    worker.dispatch("decode", HAD)
    failure = ReportFailed("lost")
    worker.attempts.transfer_failed(AttemptKey(ID, 2), failure, TransferRecord(plane="tcp"))
    worker.attempts.take_message(order)
    released, again = worker.commands[1:]
    assert released == Release(AttemptKey(ID, 2))
    assert isinstance(again, kind)
    assert (again.key, again.prompt, again.output) == (AttemptKey(ID, 3), (1, 2), (5, 6))


def several() -> Worker:
    """Of four answers the second is over; the others have 2, 0 and 1 tokens."""
    worker = Worker()
    worker.dispatch("serve", HAD, ChoiceOutput(2, ()), ChoiceOutput(3, (4,)), num_choices=4)
    return worker


def test_several_answers_go_on_one_after_the_other_each_as_a_request_of_its_own() -> None:
    worker = several()
    for choice, index, output in ((0, 2, (5, 6)), (2, 0, ()), (3, 1, (4,))):
        serve = worker.commands[-1]
        assert (serve.key, serve.output) == (AttemptKey(ID, 2, choice), output)
        assert (serve.sampling.seed, serve.sampling.num_choices) == (3 + choice, 1)
        worker.attempts.take_event(TokensEvent(serve.key, index, (9,), ()))
        worker.attempts.take_event(TokensEvent(serve.key, index + 1, (9,), ()))
    assert len(worker.commands) == 3
    for choice, index in ((0, 4), (2, 2), (3, 3)):
        assert AttemptKey(ID, 2) in worker.attempts
        worker.attempts.take_event(FinishedEvent(AttemptKey(ID, 2, choice), index, "length"))
    assert AttemptKey(ID, 2) not in worker.attempts


def test_a_choice_that_ends_before_its_turn_or_in_it_lets_the_next_one_go_on() -> None:
    worker = several()
    worker.attempts.take_message(CancelChoice(ID, 2, 2))
    assert len(worker.commands) == 1, "it was not begun"
    worker.attempts.take_message(CancelChoice(ID, 2, 0))
    assert worker.commands[1] == DropChoice(AttemptKey(ID, 2, 0))
    assert worker.commands[2].key == AttemptKey(ID, 2, 3)


def test_a_cancelled_continuation_begins_no_further_choice() -> None:
    worker = several()
    worker.attempts.take_message(CancelRequest(ID, 2, "disconnect"))
    worker.attempts.take_event(TokensEvent(AttemptKey(ID, 2, 0), 2, (9,), ()))
    assert worker.commands[1:] == [Release(AttemptKey(ID, 2))]


def test_an_answer_that_is_pressed_is_told_once_and_at_once() -> None:
    told: list[int] = []
    pairing: Any = lambda dispatch: SimpleNamespace()  # noqa: E731
    metrics: Any = SimpleNamespace()
    attempts = Attempts(
        lambda command: None,
        lambda message: None,
        pairing,
        metrics,
        fetch_wait_s=1.0,
        on_pressed=lambda: told.append(1),
    )
    transfer_id, epoch = key(1).transfer_id, key(1).epoch
    attempts.take_message(Dispatch(transfer_id, epoch, "r", "serve", (1,), Sampling(max_tokens=9), 60.0))
    attempts.take_event(PressedEvent(key(1)))
    attempts.take_event(PressedEvent(key(2)))
    assert told == [1], "of the other nothing is known here"
    assert attempts.take_pressed() == ((transfer_id, epoch),)
    assert attempts.take_pressed() == ()
