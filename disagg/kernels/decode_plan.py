"""A decode step's plan at fixed addresses, for a captured graph: each step sends what changed in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels.batch import NULL_SLOT, TRASH_SLOT, first_blocks
from disagg.kernels.device_plan import DevicePlan
from disagg.kernels.table_rows import memory_of
from disagg.kernels.upload import upload
from disagg.kernels.workspace import Workspace

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """What a row lists: `length` blocks of the table in `memory`, whose window begins at ordinal `first`."""

    memory: Int32 | None = None
    first: int = 0
    length: int = 0


class DecodePlan:
    """Room for `max_rows` decode queries of sequences of at most `max_tokens` tokens, in one layer group.

    A graph freezes shapes, addresses and every number that Python handed to a kernel. So tables are as wide as the
    longest sequence needs, and splits are counted for it: how much of that a row uses, the kernels read on the device.
    Rows past the sequences are padding: they store to the TRASH slot and attend to one token of the NULL slot.
    """

    def __init__(
        self,
        *,
        block_size: int,
        window: int | None,
        num_sink_tokens: int,
        max_rows: int,
        max_tokens: int,
        device: torch.device,
        workspace: Workspace,
    ) -> None:
        self._block_size, self._window, self._workspace = block_size, window, workspace
        self._num_sink_tokens = num_sink_tokens if window is not None else 0
        self._num_sink_blocks = -(-self._num_sink_tokens // block_size)
        self._longest = max_tokens if window is None else min(max_tokens, window + self._num_sink_tokens)
        self._columns = self._width(max_tokens)
        padded = -(-max_rows // 4) * 4  # every piece begins at 16 bytes: kernels are compiled for aligned pointers
        self._table = np.zeros((padded, self._columns), np.int32)  # as it is on the device
        self._held: list[_Row] = [_Row() for _ in range(max_rows)]
        self._heads = torch.zeros(6 * padded, dtype=torch.int32, device=device)
        self._there = torch.zeros(self._table.shape, dtype=torch.int32, device=device)
        self._padded = padded
        self._tiles = torch.tensor([[row, 0] for row in range(max_rows)], dtype=torch.int32, device=device)
        self.num_sent = 0
        """Entries of tables sent since the beginning."""

    def rows(self, count: int) -> DevicePlan:
        """The plan of a graph of `count` rows: its tensors are part of the buffers, and stay where they are."""
        slots, offsets, runs = _pieces(self._heads, self._padded)
        return DevicePlan(
            self._there[:count],
            runs[:count],
            slots[:count],
            offsets[:count],
            self._tiles[:count],
            self._longest,
            self._window,
            self._num_sink_tokens,
            self._block_size,
            self._workspace,
            (),
        )

    def fill(self, tables: Sequence[Int32], positions: npt.NDArray[np.int64], count: int) -> None:
        """One row per sequence, with its query at `positions[row]`; padding up to `count` rows."""
        num_rows, size = len(tables), self._block_size
        assert num_rows <= count <= len(self._tiles)
        end = positions // size + 1
        first, sinks = first_blocks(positions, size, self._window, self._num_sink_tokens)
        lengths = sinks + end - first
        bounds = zip(tables, sinks.tolist(), first.tolist(), end.tolist(), strict=True)
        changed = [(row, self._update(row, *what)) for row, what in enumerate(bounds)]
        changed += [(row, self._clear(row)) for row in range(num_rows, count)]
        self._send([(row, columns) for row, columns in changed if columns])
        heads = np.zeros(6 * self._padded, np.int32)
        slots, offsets, runs = (piece.numpy() for piece in _pieces(torch.from_numpy(heads), self._padded))
        slots[:num_rows] = self._table[np.arange(num_rows), lengths - 1]
        slots[num_rows:] = TRASH_SLOT
        offsets[:num_rows] = positions % size
        runs[:, 0], runs[:, 1] = np.arange(self._padded), 1
        runs[:num_rows, 2], runs[:num_rows, 3] = positions, (end - lengths) * size
        self._heads.copy_(upload(heads, self._heads.device))

    def _update(self, row: int, table: Int32, sinks: int, first: int, end: int) -> range:
        """List the blocks of one sequence in its row; the columns that changed.

        While a table's memory is the same, entries that were listed before are unchanged, and only later ones are new.
        """
        held, length, memory = self._held[row], sinks + end - first, memory_of(table)
        is_longer = held.memory is memory and held.first == first and held.length <= length
        begin = held.length if is_longer else 0
        if begin < length:
            self._table[row, begin:sinks] = table[begin:sinks]
            at = max(begin, sinks)
            self._table[row, at:length] = table[first + at - sinks : end]
            assert (self._table[row, begin:length] > NULL_SLOT).all(), "a query needs a block that has no slot"
        self._table[row, length : held.length] = NULL_SLOT
        self._held[row] = _Row(memory, first, length)
        return range(begin, max(length, held.length))

    def _clear(self, row: int) -> range:
        """Padding reads the NULL slot."""
        held, self._held[row] = self._held[row], _Row()
        self._table[row, : held.length] = NULL_SLOT
        return range(held.length)

    def _send(self, changed: Sequence[tuple[int, range]]) -> None:
        """What changed, in one copy: where, and what."""
        if not changed:
            return
        starts = (row * self._columns + columns.start for row, columns in changed)
        where = np.concatenate(
            [np.arange(at, at + len(columns)) for at, (_, columns) in zip(starts, changed, strict=True)]
        )
        self.num_sent += len(where)
        places, slots = upload(np.stack([where, self._table.reshape(-1)[where]]), self._there.device)
        self._there.view(-1)[places] = slots.to(torch.int32)

    def _width(self, max_tokens: int) -> int:
        """The most blocks that a query attends to: the sinks', and a window that begins at a block's last token."""
        blocks = -(-max_tokens // self._block_size)
        if self._window is None:
            return blocks
        return min(blocks, self._num_sink_blocks + -(-(self._window - 1) // self._block_size) + 1)


def _pieces(heads: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Slots, offsets and runs."""
    return heads[:num_rows], heads[num_rows : 2 * num_rows], heads[2 * num_rows :].view(num_rows, 4)
