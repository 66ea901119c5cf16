"""Faults of a transfer between unequal blocks over planes that send bytes: some of the table, with scarce staging."""

from __future__ import annotations

from typing import Any

import pytest
import support.faults.table as table
from support.faults.cells import Cell
from support.faults.table import Fault, Row
from support.links.shell_pair import REPLY_S, ShellTrio
from support.links.shell_unequal import UnequalTrio, patched_slices

from disagg.transceiver.protocol.state import Role, State

ROWS = [(Role.SENDER, State.PINNING), (Role.SENDER, State.SENDING)]
"""Where slices are still to come: there are more than the window holds, so no later row can be brought about."""

FAULTS = [
    table.DROPPED,
    table.REORDERED,
    table.DELAYED,
    table.DATA_CUT,
    table.KILLED,
    table.SOURCE_FLIP,
    table.LANDED_FLIP,
    table.CANCEL,
]
QUICK = (table.DROPPED, table.LANDED_FLIP)


def cases() -> list[object]:
    return [
        pytest.param(
            plane,
            0.2,
            (row, fault),
            id=f"{plane}-{row[0].value}-{row[1].value}-{fault.name}".replace(" ", "_"),
            marks=[] if fault in QUICK and plane != "ucx" else [pytest.mark.slow],
        )
        for plane in ("tcp", "zmq", "ucx")
        for row in ROWS
        for fault in FAULTS
        if (row, fault) not in table.IMPOSSIBLE
    ]


@pytest.fixture
def trio_kind() -> type[ShellTrio]:
    return UnequalTrio


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_slices(monkeypatch)


@pytest.mark.parametrize(("plane", "scale", "cell"), cases())
def test_a_fault_between_unequal_blocks_ends_in_time_too(arena: Any, scale: float, cell: tuple[Row, Fault]) -> None:
    _, seconds = arena.run(lambda trio: Cell(trio, *cell).run())
    assert seconds / scale < REPLY_S
