"""Work under a deadline that costs no timer where it does not wait."""

from __future__ import annotations

import asyncio

import pytest
from support.event_loop import in_event_loop

from disagg.api.answers.at_once import within


@in_event_loop
async def test_what_does_not_wait_makes_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    async def work() -> None:
        said.append(1)

    monkeypatch.setattr(asyncio, "timeout", lambda seconds: 1 // 0)
    await within(1, work())
    assert said == [1]
    with pytest.raises(ZeroDivisionError):
        await within(1, asyncio.sleep(0))


@in_event_loop
async def test_what_waits_goes_on_where_it_was_and_has_its_deadline() -> None:
    event, said = asyncio.Event(), []

    async def work() -> None:
        try:
            await event.wait()
            await asyncio.sleep(0)
            said.append("done")
        except asyncio.CancelledError:
            said.append("cancelled")
            raise

    with pytest.raises(TimeoutError):
        await within(0.01, work())
    task = asyncio.create_task(within(10, work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    asyncio.get_running_loop().call_soon(event.set)
    await within(10, work())
    assert said == ["cancelled", "cancelled", "done"]


@in_event_loop
async def test_its_failure_comes_through_before_and_after_it_waited() -> None:
    async def fails(*, late: bool) -> None:
        if late:
            await asyncio.sleep(0)
        raise ValueError("x")

    for late in (False, True):
        with pytest.raises(ValueError, match="x"):
            await within(1, fails(late=late))
