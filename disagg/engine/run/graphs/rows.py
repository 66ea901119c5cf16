"""Which row of a captured step each sequence has."""

from __future__ import annotations

from collections.abc import Sequence


class RowPlaces:
    """A sequence keeps its row while the batch has that many: its table is there already."""

    def __init__(self) -> None:
        self._rows: dict[object, int] = {}

    def place(self, owners: Sequence[object]) -> list[int]:
        """A row of its own in [0, n) for each of n owners; None has none to keep."""
        count = len(owners)
        kept = [self._rows.get(owner, count) for owner in owners]
        taken = set(kept)
        free = (row for row in range(count) if row not in taken)
        rows = [row if row < count else next(free) for row in kept]
        self._rows = {owner: row for owner, row in zip(owners, rows, strict=True) if owner is not None}
        return rows
