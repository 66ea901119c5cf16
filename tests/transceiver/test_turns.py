from __future__ import annotations

import asyncio

import pytest
import zmq
import zmq.asyncio

from disagg.transceiver.wire import connection
from disagg.transceiver.wire.connection import FrameReader
from disagg.transceiver.wire.turns import TURN_S, TaskTurn, TurnQueue

pytestmark = pytest.mark.anyio
NUM_ITEMS = 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    """Each item that is read takes `step_s`."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


async def passes_while(work: asyncio.Task[None]) -> int:
    """How often another task had its turn until this one was done."""
    count = 0
    while not work.done():
        await asyncio.sleep(0)
        count += 1
    return count


async def read_all(queue: TurnQueue[int]) -> list[int]:
    return [await queue.get() for _ in range(NUM_ITEMS)]


@pytest.mark.parametrize(("step_s", "least", "most"), [(0.0, 0, 3), (TURN_S, NUM_ITEMS - 2, NUM_ITEMS + 2)])
async def test_a_reader_of_slow_items_lets_others_run_and_one_of_quick_items_goes_on(
    step_s: float, least: int, most: int
) -> None:
    queue = TurnQueue[int](Clock(step_s))
    for item in range(NUM_ITEMS):
        queue.put_nowait(item)
    read: list[int] = []

    async def work() -> None:
        read.extend(await read_all(queue))

    passes = await passes_while(asyncio.create_task(work()))
    assert read == list(range(NUM_ITEMS))
    assert least <= passes <= most


async def test_a_reader_that_is_cancelled_loses_no_item() -> None:
    queue = TurnQueue[int](Clock(TURN_S))
    queue.put_nowait(7)
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)  # its turn is over: it lets this task run first
    reader.cancel()
    await asyncio.wait({reader})
    assert reader.cancelled()
    assert await queue.get() == 7


async def test_a_turn_begins_anew_after_a_wait() -> None:
    clock = Clock()
    turn = TaskTurn(clock)
    clock.now += TURN_S
    assert turn.is_over
    turn.begin()
    assert not turn.is_over


@pytest.mark.parametrize(("step_s", "least", "most"), [(0.0, 0, 8), (TURN_S, NUM_ITEMS - 2, 4 * NUM_ITEMS)])
async def test_a_flood_of_slow_frames_lets_others_run(
    monkeypatch: pytest.MonkeyPatch, step_s: float, least: int, most: int
) -> None:
    monkeypatch.setattr(connection, "TaskTurn", lambda: TaskTurn(Clock(step_s)))
    with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as near, context.socket(zmq.PAIR) as far:
        near.bind("inproc://flood")
        far.connect("inproc://flood")
        for number in range(NUM_ITEMS):
            await far.send(b"%d" % number)
        reader, read = FrameReader(near), list[int]()

        async def work() -> None:
            read.extend([int((await reader.receive())[0].bytes) for _ in range(NUM_ITEMS)])

        passes = await passes_while(asyncio.create_task(work()))
    assert read == list(range(NUM_ITEMS))
    assert least <= passes <= most
