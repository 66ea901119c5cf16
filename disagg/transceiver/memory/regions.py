"""Pool memory as a data plane sees it: a pool, the units of a slice, the job that lands them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PoolRegion:
    """One pool's memory in this process.

    `slots`: uint8 `[num_slots, slot_nbytes]`. `generations`: uint64 `[num_slots]`, written only by the owner and
    raised before a slot's first byte changes. `fd`: the memfd both lie in (generations first, slots from byte
    `slots_offset`), or -1 where memory cannot be shared.
    """

    slots: Bytes
    generations: npt.NDArray[np.uint64]
    fd: int
    slots_offset: int


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one unit of a slice lands, and where it comes from (-1 on planes whose sender pushes the bytes)."""

    group: int
    ordinal: int
    pool: int
    slot: int
    source_slot: int = -1
    source_generation: int = -1


@dataclass(frozen=True, slots=True)
class LandingJob:
    """One slice to land. Units in slice order; two jobs never share a destination slot."""

    source: str
    transfer_id: str
    epoch: int
    number: int
    destinations: tuple[Destination, ...]
