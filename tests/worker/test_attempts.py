"""What the attempts of a registration still owe the engine when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from support.model.engine_pair import key

from disagg.engine.commands import Decode, FailedEvent, Release, Reserve, TokensEvent, Unregister
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.router import (
    Dispatch,
    RequestFailed,
)
from disagg.transceiver.wire.messages.tokens import Tokens
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
