"""A data connection that stays open and passes nothing, while the control link lives: found by silence."""

from __future__ import annotations

from typing import Any

import pytest
import support.faults.table as table
from support.faults.cells import Cell, outcome_of
from support.faults.table import Row
from support.links.shell_pair import REPLY_S, ShellTrio

from disagg.transceiver.protocol.state import Role, State

ROWS = [
    (Role.SENDER, State.WAITING),
    (Role.SENDER, State.PINNING),
    (Role.RECEIVER, State.WAITING),
]
"""Where no byte has left yet. On shm no byte travels, so nothing can be silent."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].value}-{row[1].value}")
@pytest.mark.parametrize(
    ("plane", "scale"), [("zmq", 0.2), ("tcp", 0.2), pytest.param("ucx", 0.2, marks=pytest.mark.slow)]
)
def test_a_silent_data_link_ends_the_attempt_in_time(arena: Any, scale: float, row: Row) -> None:
    async def story(trio: ShellTrio) -> float:
        cell = Cell(trio, row, table.DATA_CUT)
        cell.client = trio.begin()
        await cell.halt()
        trio.links.data.stall()
        since = trio.now()
        cell.resume()
        reply = await cell.reply()
        assert outcome_of(reply) == "a2"
        assert trio.links.data.num_stalled, "bytes were on their way"
        trio.links.data.flow()
        await trio.ready()
        await trio.settle()
        trio.check()
        assert outcome_of(await trio.ask()) == "a1"
        await trio.settle()
        return reply.at - since

    assert arena.run(story) / scale < REPLY_S


@pytest.mark.parametrize(("plane", "scale"), [("tcp", 0.2)])
@pytest.mark.parametrize("at", [0, 16, 20, 24, 28])
def test_a_damaged_header_of_a_slice_ends_the_attempt_in_time(arena: Any, scale: float, at: int) -> None:
    async def story(trio: ShellTrio) -> float:
        cell = Cell(trio, (Role.SENDER, State.PINNING), table.DATA_CUT)
        cell.client = trio.begin()
        await cell.halt()
        trio.links.data.flip_payload_at = at
        since = trio.now()
        cell.resume()
        reply = await cell.reply()
        assert outcome_of(reply) == "a2"
        await trio.ready()
        await trio.settle()
        trio.check()
        assert outcome_of(await trio.ask()) == "a1"
        await trio.settle()
        return reply.at - since

    assert arena.run(story) / scale < REPLY_S
