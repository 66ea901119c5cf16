"""What the event loop and landing threads share: threads that take turns after every bytecode find no gap."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.transceiver.memory.regions import LandingJob
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.reshaping import ReshapingPlane, _Staged, _Staging
from disagg.transceiver.planes.slice_stream import wire_name
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane, _Expected

NUM_ROUNDS = 1500
JOBS = [LandingJob("s", f"t{i}", 1, 0, ()) for i in range(8)]


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Load does seldom what this does often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def tcp_plane() -> TcpLandingPlane:
    """Slices that were fetched and wait for a landing thread."""
    plane = TcpLandingPlane()
    for job in JOBS:
        here: Any = None
        plane._landable[wire_name(job.transfer_id, 1), 0] = _Expected(1, 1, [], here)
    return plane


def reshaping_plane() -> ReshapingPlane:
    plane = ReshapingPlane.__new__(ReshapingPlane)
    stubs: dict[str, Any] = {
        "_inner": SimpleNamespace(discard=lambda *name: None, land=lambda job: 0),
        "_loop": SimpleNamespace(call_soon_threadsafe=lambda *call: None),
        "_sources": None,
        "_staging": _Staging([]),
        "_staging_lock": threading.Lock(),
        "_staged": {(job.transfer_id, 1, 0): _Staged(job, ()) for job in JOBS},
    }
    for name, value in stubs.items():
        setattr(plane, name, value)
    return plane


def land_and_discard(make: Callable[[], LandingPlane]) -> Exception | None:
    """What `discard` or `land` raised in one of many rounds."""
    raised: list[Exception] = []

    def land(plane: LandingPlane) -> None:
        try:
            for job in JOBS:
                plane.land(job)
        except Exception as exc:
            raised.append(exc)

    for _ in range(NUM_ROUNDS):
        plane = make()
        thread = threading.Thread(target=land, args=(plane,))
        thread.start()
        try:
            for number in range(20):
                plane.discard(f"other{number}", 1)
        except RuntimeError as exc:  # dictionary changed size during iteration
            raised.append(exc)
        thread.join()
        if raised:
            return raised[0]
    return None


@pytest.mark.parametrize("make", [tcp_plane, reshaping_plane])
def test_discarding_an_epoch_while_another_lands_raises_nothing(make: Callable[[], LandingPlane]) -> None:
    assert land_and_discard(make) is None


def test_without_its_lock_the_same_rounds_find_the_race() -> None:
    def unlocked() -> TcpLandingPlane:
        plane = tcp_plane()
        plane._landing_lock = contextlib.nullcontext()  # type: ignore[assignment]
        return plane

    assert any(isinstance(land_and_discard(unlocked), RuntimeError) for _ in range(20))


def test_copies_that_two_threads_make_are_all_counted() -> None:
    plane = TcpLandingPlane()

    def count() -> None:
        for _ in range(20_000):
            plane._count_operations(1)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plane.num_operations == 40_000
