"""Units whose slots follow each other: what one copy can move."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from disagg.transceiver.wire.errors import RemoteProtocolError

Ints = npt.NDArray[np.int64]


def ints(values: Sequence[int]) -> Ints:
    """int64 `[len(values)]`. Raises `RemoteProtocolError` for a number no slot or generation has."""
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as exc:
        raise RemoteProtocolError("a slot or generation is out of range") from exc


def adjacent(pools: Ints, *slots: Ints) -> Iterator[tuple[int, int]]:
    """Cut units 0..n into (start, stop) runs in which the pool stays and each column of `slots` counts up by one."""
    if len(pools) == 0:
        return
    breaks = np.diff(pools) != 0
    for column in slots:
        breaks |= np.diff(column) != 1
    cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pools)]
    yield from itertools.pairwise(cuts)
