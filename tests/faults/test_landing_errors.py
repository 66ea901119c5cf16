"""An error of our own in a landing job: its attempt fails at once, and the worker serves on."""

from __future__ import annotations

from typing import Any

import pytest
from support.event_loop import until
from support.faults.cells import outcome_of
from support.links.shell_pair import ShellTrio


@pytest.mark.parametrize("plane", ["shm", "zmq"])  # begun without a task, and fetched by one
@pytest.mark.parametrize("scale", [0.2])
def test_a_bug_in_a_landing_job_costs_its_attempt_and_says_where_it_is(
    arena: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(trio: ShellTrio) -> None:
        plane = trio.decode.plane
        num_broken, land = 0, plane.land

        def broken(*job: Any) -> int:
            nonlocal num_broken
            num_broken += 1
            raise ValueError("a bug of ours")

        plane.land = broken
        client = trio.begin()
        await until(lambda: num_broken, "a slice is landed")
        plane.land = land
        assert outcome_of(await client) == "a2"
        await trio.settle()
        trio.check()
        assert outcome_of(await trio.ask()) == "a1"
        await trio.settle()

    arena.run(story)
    told = [record for record in caplog.records if "was not landed" in record.getMessage()]
    assert told
    assert all(record.exc_info and record.exc_info[0] is ValueError for record in told)
