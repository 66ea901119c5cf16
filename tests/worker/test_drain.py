"""The end of a worker in good order: told at once, waits for what is open, and never longer than its time."""

from __future__ import annotations

import asyncio
import logging

import pytest
from support.event_loop import in_event_loop, within

from disagg.worker import drain as module
from disagg.worker.drain import Drain


class FakeRegistration:
    """Counts what is open, and notes what the drain asked of the link, in order."""

    def __init__(self, num_open: int = 0) -> None:
        self.num_open = num_open
        self.said: list[str] = []
        self.is_flushed = asyncio.Event()

    def tell(self) -> None:
        self.said.append("draining")

    async def flushed(self) -> None:
        self.said.append("flushed")
        await self.is_flushed.wait()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(module, "LOOK_S", 0.0)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@in_event_loop
async def test_a_worker_that_is_not_registered_ends_at_once() -> None:
    drain = Drain(60.0)
    drain.ask()
    assert drain.over.is_set()
    assert not drain.asked.is_set()


@in_event_loop
async def test_a_drain_is_over_when_nothing_is_open_and_the_last_word_has_left() -> None:
    drain, registration = Drain(60.0), FakeRegistration(num_open=2)
    with drain.serving(lambda: registration.num_open):
        running = asyncio.create_task(drain.run(registration.tell, registration.flushed))
        await turns()
        assert registration.said == []  # nobody asked yet
        drain.ask()
        await turns()
        assert registration.said == ["draining"]
        registration.num_open = 0
        await turns()
        assert registration.said == ["draining", "flushed"]
        assert not drain.over.is_set()
        registration.is_flushed.set()
        await within(running)
    assert drain.over.is_set()


@in_event_loop
async def test_a_drain_ends_with_its_time_whatever_is_open() -> None:
    drain, registration = Drain(0.01), FakeRegistration(num_open=3)
    with drain.serving(lambda: registration.num_open):
        drain.ask()
        await within(drain.over.wait())
    assert registration.said == []


@in_event_loop
async def test_asking_twice_ends_a_drain_at_once() -> None:
    drain, registration = Drain(60.0), FakeRegistration(num_open=1)
    with drain.serving(lambda: registration.num_open):
        drain.ask()
        assert not drain.over.is_set()
        drain.ask()
        assert drain.over.is_set()


def test_what_is_left_behind_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        drain = Drain(0.01)
        with drain.serving(lambda: 3):
            drain.ask()
            await within(drain.over.wait())

    with caplog.at_level(logging.INFO):
        asyncio.run(story())
    assert "draining: 3 requests to finish within 0.01 s" in caplog.text
    assert "leaving 3 requests behind" in caplog.text
