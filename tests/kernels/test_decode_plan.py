"""The plan at fixed addresses says what the plan made anew says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disagg.kernels.batch import NULL_SLOT, TRASH_SLOT, PagedBatch, QueryRun
from disagg.kernels.decode_plan import DecodePlan
from disagg.kernels.device_plan import device_plan
from disagg.kernels.workspace import Workspace

MAX_TOKENS = 90
CPU = torch.device("cpu")


def table_of(position: int, block_size: int, first_slot: int) -> np.ndarray:
    return np.arange(first_slot, first_slot + position // block_size + 1, dtype=np.int32)


@given(
    positions=st.lists(st.integers(0, MAX_TOKENS - 1), min_size=1, max_size=5),
    earlier=st.lists(st.integers(0, MAX_TOKENS - 1), max_size=5),
    block_size=st.integers(1, 16),
    window=st.none() | st.integers(1, 40),
    num_sink_tokens=st.integers(0, 20),
    padding=st.integers(0, 3),
)
def test_a_filled_plan_is_the_batchs(
    positions: list[int],
    earlier: list[int],
    block_size: int,
    window: int | None,
    num_sink_tokens: int,
    padding: int,
) -> None:
    plan = DecodePlan(
        block_size=block_size,
        window=window,
        num_sink_tokens=num_sink_tokens,
        max_rows=8,
        max_tokens=MAX_TOKENS,
        device=CPU,
        workspace=Workspace(),
    )
    rows = plan.rows(len(positions) + padding)
    addresses = [x.data_ptr() for x in (rows.table, rows.runs, rows.write_slots, rows.write_offsets)]
    for step in (earlier, positions):  # what an earlier step left is overwritten
        tables = [table_of(p, block_size, 2 + 100 * i) for i, p in enumerate(step)]
        plan.fill(tables, np.array(step, np.int64), max(len(step), len(positions) + padding))
    batch = PagedBatch(
        tuple(QueryRun(table, p, 1) for table, p in zip(tables, positions, strict=True)),
        block_size,
        window,
        num_sink_tokens,
    )
    anew = device_plan(batch, torch.empty(2, 2, 1, block_size, 1), Workspace())
    n, width = len(positions), anew.table.shape[1]
    assert torch.equal(rows.table[:n, :width], anew.table)
    assert (rows.table[:n, width:] == NULL_SLOT).all()
    assert torch.equal(rows.runs[:n], anew.runs)
    assert torch.equal(rows.write_slots[:n], anew.write_slots)
    assert torch.equal(rows.write_offsets[:n], anew.write_offsets)
    assert torch.equal(rows.decode_tiles[:n], anew.decode_tiles)
    assert rows.longest >= anew.longest
    assert (rows.window, rows.num_sink_tokens, rows.block_size) == (window, anew.num_sink_tokens, block_size)
    # Padding: one token of the NULL slot is read, the TRASH slot is written.
    assert (rows.table[n:] == NULL_SLOT).all()
    assert (rows.write_slots[n:] == TRASH_SLOT).all()
    assert rows.runs[n:].tolist() == [[row, 1, 0, 0] for row in range(n, n + padding)]
    assert addresses == [x.data_ptr() for x in (rows.table, rows.runs, rows.write_slots, rows.write_offsets)]


def test_a_block_without_a_slot_is_noticed() -> None:
    plan = DecodePlan(
        block_size=4, window=None, num_sink_tokens=0, max_rows=2, max_tokens=40, device=CPU, workspace=Workspace()
    )
    holed = table_of(11, 4, 2)
    holed[1] = -1
    with pytest.raises(AssertionError, match="has no slot"):
        plan.fill([holed], np.array([11]), 2)


def test_what_a_row_no_longer_lists_is_cleared() -> None:
    plan = DecodePlan(
        block_size=1, window=None, num_sink_tokens=0, max_rows=3, max_tokens=9, device=CPU, workspace=Workspace()
    )
    rows = plan.rows(3)
    for lengths in ((9, 5, 2), (3,), (4, 8), (9, 9, 9), ()):
        plan.fill([table_of(n - 1, 1, 2 + 10 * i) for i, n in enumerate(lengths)], np.array(lengths, np.int64) - 1, 3)
        used = (rows.table != NULL_SLOT).sum(1).tolist()
        assert used == [*lengths, *[0] * (3 - len(lengths))]
