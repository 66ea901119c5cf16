"""Every fault in every state of a transfer, through the real shells: the answer is right, or there is an error in time.

Each cell halts a request's transfer in its state, lets one fault happen there, and asserts that it happened, that the
client then gets what `support.faults.table` allows within 5 s, that no slot stays used on either side, and that the
next request is answered by the survivors as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.faults.cells import Cell
from support.faults.table import FAULTS, IMPOSSIBLE, QUICK_FAULTS, ROWS, Fault, Row, allowed, cells

from disagg.transceiver.protocol.state import TRANSITIONS, Role

CI, TRUE = 0.2, 1.0
"""What constants of time are multiplied by. At a fifth a peer is lost after 0.6 s: a loaded machine keeps that too."""

Results = dict[tuple[str, float], dict[tuple[Row, Fault], tuple[str, float]]]


def name_of(cell: tuple[Row, Fault]) -> str:
    (role, state), fault = cell
    return f"{role.value}-{state.value}-{fault.name}".replace(" ", "_")


def runs_in_ci(cell: tuple[Row, Fault]) -> bool:
    """All cells that take milliseconds, and of those that wait every third: `make faults` runs them all."""
    row, fault = cell
    return fault in QUICK_FAULTS or (ROWS.index(row) + FAULTS.index(fault)) % 3 == 0


def cases() -> list[object]:
    made = []
    for plane, scale in (("shm", CI), ("zmq", CI), ("tcp", CI), ("ucx", CI), ("inproc", CI), ("shm", TRUE)):
        for cell in cells():
            is_quick = (plane, scale) == ("shm", CI) and runs_in_ci(cell)
            marks = [] if is_quick else [pytest.mark.slow]
            made.append(pytest.param(plane, scale, cell, id=f"{plane}-x{scale:g}-{name_of(cell)}", marks=marks))
    return made


@pytest.mark.parametrize(("plane", "scale", "cell"), cases())
def test_a_fault_in_a_state_ends_in_an_answer_or_an_error(arena: Any, cell: tuple[Row, Fault]) -> None:
    arena.results[cell] = arena.run(lambda trio: Cell(trio, *cell).run())


def test_the_table_has_every_state_and_every_cell_an_expectation_or_a_reason() -> None:
    """Of a handoff. Moves are broken off at each of their messages in `tests/worker/test_moving_world.py`."""
    handoffs = (Role.SENDER, Role.RECEIVER)
    assert list(ROWS) == [(role, state) for role in handoffs for state in TRANSITIONS[role]]
    assert TRANSITIONS.keys() == {*handoffs, Role.MOVE_SOURCE, Role.MOVE_SINK}
    for row in ROWS:
        for fault in FAULTS:
            assert IMPOSSIBLE.get((row, fault)) or allowed(row, fault, sends_bytes=False)


def test_no_selected_cell_is_empty(request: pytest.FixtureRequest, results: Results) -> None:
    """Runs last in this file: whatever of the table was to run has left its outcome."""
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "cell" in parameters and item.path == request.node.path:
            assert parameters["cell"] in results.get((parameters["plane"], parameters["scale"]), {}), item.nodeid
