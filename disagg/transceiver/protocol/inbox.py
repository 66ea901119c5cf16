"""The receiver's slices: which were announced, which have landed, and whether they add up to what was required."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from disagg.transceiver.protocol.events import LandedUnit
from disagg.transceiver.wire.messages.digests import DIGEST, ORDINAL, GroupDigests
from disagg.transceiver.wire.messages.peer import Slice
from disagg.transceiver.wire.messages.values import UnitName, UnitRun

UnitKey = tuple[int, int]
"""(group, ordinal)"""


class BadSliceError(ValueError):
    """A slice that no honest sender says: it names a unit that was not asked for, or one twice."""


class Inbox:
    """Slices of one epoch. Holds at most one slice per required unit, so a peer cannot make it grow."""

    def __init__(self, required: Iterable[UnitKey]) -> None:
        self.required = frozenset(required)
        self._places = {key: place for place, key in enumerate(sorted(self.required))}
        self._ordinals = _packed_ordinals(self._places)
        self._digests = np.zeros(len(self._places), DIGEST)
        self._unannounced = set(self.required)
        self._slices: dict[int, frozenset[UnitKey]] = {}
        self._num_landed = 0
        self._landed_numbers: set[int] = set()
        self.highest = -1
        """Highest number with no gap below it that has landed: what RECEIVED says."""

    def announce(self, message: Slice) -> bool:
        """Take a slice in; False when its number is known already. Raises `BadSliceError` and changes nothing."""
        if message.number in self._slices:
            return False
        units = self._units_of(message)
        self._slices[message.number] = units
        self._unannounced -= units
        return True

    def is_landing(self, number: int) -> bool:
        """Was this slice announced and not yet reported landed?"""
        return number in self._slices and number not in self._landed_numbers

    def expects(self, number: int, units: Sequence[LandedUnit]) -> bool:
        """Are these exactly the units of an announced slice that has not landed yet?"""
        keys = {(unit.group, unit.ordinal) for unit in units}
        return self.is_landing(number) and len(keys) == len(units) and keys == self._slices[number]

    def land(self, number: int, units: Sequence[LandedUnit]) -> None:
        """The landing job of an announced slice finished. Call only what `expects` admits."""
        self._landed_numbers.add(number)
        self._num_landed += len(units)
        for unit in units:
            self._digests[self._places[unit.group, unit.ordinal]] = unit.digest
        while self.highest + 1 in self._landed_numbers:
            self.highest += 1

    def is_covered(self, manifest: Iterable[GroupDigests]) -> bool:
        """Does it name exactly what was required? Compared as bytes: there may be 73,728 units."""
        return {entry.group: entry.ordinals for entry in manifest} == self._ordinals

    def disagreeing(self, manifest: Iterable[GroupDigests]) -> tuple[UnitName, ...]:
        """Landed units whose digest is not the manifest's, which covers `required`; all of it has landed."""
        named = np.frombuffer(b"".join(entry.digests for entry in manifest), DIGEST)
        units = list(self._places)
        return tuple(UnitName(*units[place]) for place in np.flatnonzero(named != self._digests).tolist())

    @property
    def is_all_landed(self) -> bool:
        return self._num_landed == len(self.required)

    @property
    def num_announced(self) -> int:
        return len(self._slices)

    @property
    def highest_announced(self) -> int:
        return max(self._slices, default=-1)

    def _units_of(self, message: Slice) -> frozenset[UnitKey]:
        # Lengths first: a run's count is the peer's word, and must not be enumerated before it is known to be small.
        total = sum(run.count for run in message.units)
        if not 0 <= message.number < len(self.required) or not 0 < total <= len(self._unannounced):
            raise BadSliceError(f"slice {message.number} of {total} units, {len(self._unannounced)} are outstanding")
        if not all(map(_is_well_formed, message.units)):
            raise BadSliceError(f"slice {message.number}: a run is empty or its slots do not match its units")
        keys = [(run.group, run.first + i) for run in message.units for i in range(run.count)]
        if len(set(keys)) != len(keys) or not self._unannounced.issuperset(keys):
            raise BadSliceError(f"slice {message.number} names units that were not asked for, or twice")
        return frozenset(keys)


def _packed_ordinals(units: Iterable[UnitKey]) -> dict[int, bytes]:
    """Per group, as `GroupDigests.ordinals` has them. `units` ascending."""
    found: dict[int, list[int]] = {}
    for group, ordinal in units:
        found.setdefault(group, []).append(ordinal)
    return {group: np.array(ordinals, ORDINAL).tobytes() for group, ordinals in found.items()}


def _is_well_formed(run: UnitRun) -> bool:
    """At least one unit, and a slot and a generation for each of them or for none."""
    return run.count > 0 and len(run.slots) == len(run.generations) and len(run.slots) in (0, run.count)
