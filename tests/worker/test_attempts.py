"""What the attempts of a registration still owe the engine when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from support.engine_pair import key

from disagg.engine.commands import Release, Unregister
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.wire.messages.values import UnitName
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
