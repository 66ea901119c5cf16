"""Block tables side by side, kept from step to step: what a table gained is copied, and not the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def memory_of(table: Int32) -> Int32:
    """The memory of a table. A table that only grew keeps its memory; one that changed otherwise has new memory."""
    return table.base if isinstance(table.base, np.ndarray) else table


@dataclass(slots=True, eq=False)
class _Row:
    """The first `length` entries of `memory` are in this row."""

    memory: Int32
    number: int
    length: int


class TableRows:
    """`entries` int32 `[rows, width]`: each table of the last `place` in a row of its own, by ordinal.

    Entries behind a table's end, or of blocks that it has let go since, are leftovers, which no query reads.
    """

    def __init__(self) -> None:
        self.entries: Int32 = np.zeros((0, 0), np.int32)
        self.num_copied = 0
        """Entries copied since the beginning."""
        self._rows: dict[int, _Row] = {}  # by id of the memory, which the row keeps alive

    def place(self, tables: Sequence[Int32]) -> npt.NDArray[np.int64]:
        """Bring the rows up to date; per table, where it begins in the flat `entries`."""
        self._make_room(len(tables), max(map(len, tables), default=0))
        memories = list(map(memory_of, tables))
        held = self._rows
        if any(id(memory) not in held for memory in memories):
            held = self._rows = self._with(memories)
        rows = [held[id(memory)] for memory in memories]
        for row, table in zip(rows, tables, strict=True):
            if len(table) > row.length:
                self._copy(row, table)
        numbers: npt.NDArray[np.int64] = np.array([row.number for row in rows], np.int64)
        numbers *= self.entries.shape[1]
        return numbers

    def _with(self, memories: Sequence[Int32]) -> dict[int, _Row]:
        """A row for each of these. Owners that are gone leave their rows to new ones."""
        rows = {id(memory): self._rows[id(memory)] for memory in memories if id(memory) in self._rows}
        taken = {row.number for row in rows.values()}
        free = (number for number in range(len(self.entries)) if number not in taken)
        for memory in memories:
            if id(memory) not in rows:
                rows[id(memory)] = _Row(memory, next(free), 0)
        return rows

    def _copy(self, row: _Row, table: Int32) -> None:
        self.entries[row.number, row.length : len(table)] = table[row.length :]
        self.num_copied += len(table) - row.length
        row.length = len(table)

    def _make_room(self, num_rows: int, width: int) -> None:
        """Twice what is asked, so that it is seldom asked again; then all tables are new."""
        if num_rows > len(self.entries) or width > self.entries.shape[1]:
            shape = (max(2 * num_rows, len(self.entries)), max(2 * width, self.entries.shape[1]))
            self.entries, self._rows = np.zeros(shape, np.int32), {}
