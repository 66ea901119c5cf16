"""The sender's slices: units that became final, cut, numbered, and kept until the receiver says they have landed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from disagg.transceiver.layout.slice_size import SLICE_NBYTES
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.wire.messages.ranges import MAX_SLICE_RUNS, MAX_SLICE_UNITS

READ_SLICE_NBYTES: Final = 32 << 20
"""The same where the receiver reads the bytes for itself: nothing is under way that it would have to drain, and a copy
that it must join takes 3 ms. Sixteen messages for 128 MiB would hold both cores for a millisecond, four do not: 0.085 s
of CPU per GB instead of 0.101, and two landing threads still have two slices each."""

BYTE_WINDOW: Final = 8
"""Slices in flight where the sender pushes bytes: RECEIVED comes for half of them at once, and while it travels the
other half keeps the wire, the landing and the hashing busy. A receiver never buffers more than 64 MiB per transfer."""

REPEAT_BURST: Final = 16
"""Unanswered slices said again at once: bounds the traffic of a repeat; one RECEIVED covers them all."""

UnitKey = tuple[int, int]
"""(group, ordinal)"""


class Outbox:
    """Slices of one epoch, in order. Takes the units of one computation; ignores units that were not required."""

    def __init__(self, required: Iterable[UnitKey], unit_nbytes: Sequence[int], *, pushes_bytes: bool) -> None:
        self._missing = set(required)
        self._unit_nbytes = unit_nbytes
        self._window = BYTE_WINDOW if pushes_bytes else None
        self._slice_nbytes = SLICE_NBYTES if pushes_bytes else READ_SLICE_NBYTES
        self._pending: list[HashedUnit] = []
        self._slices: list[tuple[HashedUnit, ...]] = []
        self._acknowledged = 0

    def add(self, units: Iterable[HashedUnit]) -> None:
        """Units that are final now. A unit counts once, however often it is reported."""
        for unit in units:
            if (unit.group, unit.ordinal) in self._missing:
                self._missing.discard((unit.group, unit.ordinal))
                self._pending.append(unit)

    def cut(self) -> list[int]:
        """Turn pending units into slices as far as the window allows; the numbers of the new ones."""
        first = self.num_slices
        while self._pending and self._has_credit:
            count = self._next_slice_length()
            self._slices.append(tuple(self._pending[:count]))
            del self._pending[:count]
        return list(range(first, self.num_slices))

    def acknowledge(self, number: int) -> bool:
        """Everything up to `number` has landed. True when that is news. `number` < `num_slices`."""
        assert number < self.num_slices
        is_news = number >= self._acknowledged
        self._acknowledged = max(self._acknowledged, number + 1)
        return is_news

    def slice_units(self, number: int) -> tuple[HashedUnit, ...]:
        return self._slices[number]

    @property
    def num_slices(self) -> int:
        return len(self._slices)

    @property
    def unanswered(self) -> range:
        """Numbers of the oldest slices not known to have landed, at most `REPEAT_BURST`."""
        return range(self._acknowledged, min(self.num_slices, self._acknowledged + REPEAT_BURST))

    @property
    def missing(self) -> tuple[UnitKey, ...]:
        """Required units that were never reported final."""
        return tuple(sorted(self._missing))

    @property
    def is_all_announced(self) -> bool:
        return not self._missing and not self._pending

    @property
    def announced(self) -> tuple[HashedUnit, ...]:
        return tuple(unit for units in self._slices for unit in units)

    @property
    def _has_credit(self) -> bool:
        return self._window is None or self.num_slices - self._acknowledged < self._window

    def _next_slice_length(self) -> int:
        """As many as one SLICE may name, and as their bytes allow; at least one."""
        nbytes, num_runs, last = 0, 0, (-1, -1)
        for count, unit in enumerate(self._pending[:MAX_SLICE_UNITS]):
            nbytes += self._unit_nbytes[unit.group]
            num_runs += (unit.group, unit.ordinal - 1) != last
            last = unit.group, unit.ordinal
            if count > 0 and (nbytes > self._slice_nbytes or num_runs > MAX_SLICE_RUNS):
                return count
        return min(len(self._pending), MAX_SLICE_UNITS)
