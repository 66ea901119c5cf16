"""From every state before the first token a failed transfer goes on at another prefill worker, under the next epoch.

That the decode worker computes the prompt itself where there is no other is what `test_table.py` shows, state by state.
"""

from __future__ import annotations

from typing import Any

import pytest
import support.faults.table as table
from support.faults.table import ROWS, VERIFIED, Row
from support.links.shell_pair import ShellTrio
from support.links.shell_spare import SPARE, RetargetCell, SpareTrio

from disagg.transceiver.protocol.state import Role

BEFORE = [row for row in ROWS if row not in VERIFIED]


@pytest.fixture
def trio_kind() -> type[ShellTrio]:
    return SpareTrio


@pytest.mark.parametrize("row", BEFORE, ids=lambda row: f"{row[0].value}-{row[1].value}")
@pytest.mark.parametrize(("plane", "scale"), [("shm", 0.2), pytest.param("tcp", 0.2, marks=pytest.mark.slow)])
def test_a_failed_transfer_goes_on_at_another_prefill_worker(arena: Any, row: Row) -> None:
    """A prefill worker dies under the receiver; a sender loses its link and lives on, holding nothing of it."""
    fault = table.KILLED if row[0] is Role.RECEIVER else table.CONTROL_CUT

    async def story(trio: SpareTrio) -> list[dict[str, Any]]:
        cell = RetargetCell(trio, row, fault)
        outcome, _ = await cell.run()
        assert outcome == "a2"
        return cell.attempts()

    first, second = arena.run(story)
    assert (first["mode"], first["prefill"]) == ("transfer", "prefill")
    assert (second["mode"], second["prefill"], second["decode"]) == ("retarget", SPARE, "decode")
