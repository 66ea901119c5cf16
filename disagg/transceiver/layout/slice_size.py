"""How many units one slice carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SLICE_NBYTES: Final = 8 << 20
"""A slice ends here (one larger unit goes alone): what a receiver that stops must drain at most, 7 ms at 10 Gbit/s,
while a message's own cost, tens of microseconds, stays below a hundredth of that."""


def units_per_slice(unit_nbytes: Sequence[int]) -> int:
    """Of the largest kind. So many are hashed before they are announced, and land while the next are being hashed."""
    return max(1, SLICE_NBYTES // max(1, *unit_nbytes))
