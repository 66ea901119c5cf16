"""The digests of DONE, in columns of bytes: one transfer has up to 73,728 of them, which are compared as they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.transceiver.wire.messages.ranges import (
    MAX_GROUPS,
    MAX_HEADS,
    MAX_ORDINAL,
    MAX_UNITS,
    check_int,
    check_ints,
    check_size,
    fail,
)

ORDINAL: Final = np.dtype("<u4")
DIGEST: Final = np.dtype("<u8")
ORDINAL_NBYTES: Final = ORDINAL.itemsize
DIGEST_NBYTES: Final = DIGEST.itemsize


@dataclass(frozen=True, slots=True)
class GroupDigests:
    """The digests of one layer group's units, in columns: unit `ordinals[i]` has `digests[i]`.

    `ordinals`: ascending, as the bytes of little-endian uint32; `digests`: as many, of uint64. `rectangle` = (first
    layer, layers, first head, heads) of the group that each covers; with equal geometry always the whole group.
    """

    group: int
    rectangle: tuple[int, int, int, int]
    ordinals: bytes
    digests: bytes

    def __post_init__(self) -> None:
        check_int("group", self.group, 0, MAX_GROUPS - 1)
        check_ints("rectangle", self.rectangle, 0, MAX_HEADS)
        check_size("ordinals", self.ordinals, ORDINAL_NBYTES * MAX_UNITS, ORDINAL_NBYTES)
        if len(self.ordinals) % ORDINAL_NBYTES or len(self.digests) != DIGEST_NBYTES * self.num_units:
            fail(
                "digests", (len(self.ordinals), len(self.digests)), "bytes of as many ordinals as digests, 4 and 8 each"
            )
        ordinals = np.frombuffer(self.ordinals, ORDINAL)
        if not (ordinals[1:] > ordinals[:-1]).all() or ordinals[-1] >= MAX_ORDINAL:
            fail("ordinals", ordinals, f"ascending ones below {MAX_ORDINAL}")

    @classmethod
    def of(cls, group: int, rectangle: tuple[int, int, int, int], digests: Mapping[int, int]) -> GroupDigests:
        """`digests`: at least one, by ordinal."""
        ordinals = sorted(digests)
        check_ints("ordinals", ordinals, 0, MAX_ORDINAL - 1)
        columns = np.array(ordinals, ORDINAL), np.array([digests[ordinal] for ordinal in ordinals], DIGEST)
        return cls(group, rectangle, *(column.tobytes() for column in columns))

    @property
    def num_units(self) -> int:
        return len(self.ordinals) // ORDINAL_NBYTES

    def by_ordinal(self) -> dict[int, int]:
        ordinals, digests = np.frombuffer(self.ordinals, ORDINAL), np.frombuffer(self.digests, DIGEST)
        return dict(zip(ordinals.tolist(), digests.tolist(), strict=True))
