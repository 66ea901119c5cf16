"""A landing plane that copies slot to slot, from memory that both processes can read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from disagg.transceiver.layout.runs import Ints
from disagg.transceiver.memory.regions import LandingJob, PoolRegion
from disagg.transceiver.planes.base import LandingPlane, UnitHasher

Copy = Callable[[Sequence[PoolRegion], Sequence[PoolRegion], Ints, Ints, Ints], None]
"""Destination and source pools, then per unit its pool, its slot and its source slot: `copy_slots`, or with a look."""


class CopyingLandingPlane(LandingPlane):
    """A plane whose `land` copies every unit whole from memory of this process, so that it can be hashed meanwhile."""

    @abstractmethod
    def land(self, job: LandingJob, copy: Copy | None = None) -> int:
        """As `LandingPlane.land`, by `copy` where it is given."""

    def land_and_hash(self, job: LandingJob, hasher: UnitHasher) -> int:
        """Units are hashed as they are copied, unless a test is to see them in between."""
        self.land(job, hasher.copy)
        hasher.look()
        return 0
