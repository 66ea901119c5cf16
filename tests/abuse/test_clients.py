"""Idle and slow clients, more of them than a process may have descriptors: running requests go on, new ones come in."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import pytest
from support.abuse.aside import aside
from support.abuse.clients import READING_KINDS, SILENT_KINDS, Newcomers, crowd, newcomers
from support.abuse.honest import Ask
from support.abuse.pair import NUM_FILES, Door, Pair
from support.abuse.watch import Watch, watching

pytestmark = pytest.mark.processes

NUM_SILENT = NUM_FILES + 176  # more than there are descriptors for, none of which is free
NUM_READING = 4
NUM_OWN_FILES = NUM_SILENT + 500
BASELINE_S = 1.0
MAX_LOG_LINES = 50  # of warnings and worse: a crowd is told of once, not once for each


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """The clients' own descriptors, which are this process's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < NUM_OWN_FILES:
        pytest.skip(f"this machine lets a process have {hard} descriptors, {NUM_OWN_FILES} are needed for the crowd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, NUM_OWN_FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def crowd_the_door(watch: Watch, door: Door, seconds: float, num_reading: int) -> Newcomers:
    async with crowd(door, SILENT_KINDS, NUM_SILENT) as silent, crowd(door, READING_KINDS, num_reading) as reading:
        seen = await newcomers(watch.pair.door_of_http(), seconds)
        watch.figures["crowd"] = f"{silent}; {reading}"
    watch.late += seen.faults[:5]
    watch.figures["newcomers"] = f"{seen.num_answered} answered, {len(seen.faults)} not, longest {seen.longest_s:.2f} s"
    return seen


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(3, id="short"),
        pytest.param(90, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(240)]),
    ],  # 90: past every time limit
)
@pytest.mark.parametrize("door", ["http", pytest.param("admin", marks=pytest.mark.slow)])
def test_a_crowd_of_idle_and_slow_clients(pair: Pair, asks: list[Ask], door: str, seconds: float) -> None:
    with watching(pair, asks, BASELINE_S) as watch:
        num_lines = len(pair.parts["router"].log)
        where = pair.door_of_http() if door == "http" else pair.door_of_admin()
        crowding = crowd_the_door(watch, where, seconds, NUM_READING if door == "http" else 0)
        aside(lambda: asyncio.run(crowding))
        new_lines = [line for line in pair.parts["router"].log[num_lines:] if " level=info " not in line]
        watch.figures["log lines"] = len(new_lines)
        if len(new_lines) > MAX_LOG_LINES:
            watch.wrong.append(f"{len(new_lines)} log lines, such as {new_lines[-1][:300]}")
