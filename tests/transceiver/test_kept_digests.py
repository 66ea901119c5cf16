from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.event_loop import in_event_loop

from disagg.transceiver.errors import SourceChanged
from disagg.transceiver.events import Unit
from disagg.transceiver.kept_digests import KeptDigests
from disagg.transceiver.planes.base import SourceUnit


class Hasher:
    """Digests that tell which hash they came from."""

    def __init__(self) -> None:
        self.asked: list[SourceUnit] = []

    async def __call__(self, units: Sequence[SourceUnit]) -> tuple[Unit, ...]:
        self.asked += units
        return tuple(Unit(u.group, u.ordinal, u.slot, u.generation, 2**63 + len(self.asked)) for u in units)


@in_event_loop
async def test_a_block_is_hashed_once_per_generation_wherever_it_is_reused() -> None:
    kept, hasher = KeptDigests((10, 10)), Hasher()
    first, other = SourceUnit(0, 3, 0, 4, 1), SourceUnit(1, 3, 1, 4, 1)
    (unit,) = await kept.digest_units([first], hasher)
    units = await kept.digest_units([other, first], hasher)
    assert hasher.asked == [first, other]
    assert units[1] == unit
    assert await kept.digest_units([first, other], hasher) == units[::-1]
    again = SourceUnit(0, 3, 0, 4, 3)
    (newer,) = await kept.digest_units([again], hasher)
    assert hasher.asked[-1] == again
    assert newer.digest != unit.digest


@in_event_loop
async def test_a_hash_that_fails_keeps_nothing() -> None:
    async def gone(units: Sequence[SourceUnit]) -> tuple[Unit, ...]:
        raise SourceChanged("given away")

    kept, hasher, unit = KeptDigests((10,)), Hasher(), SourceUnit(0, 3, 0, 4, 1)
    with pytest.raises(SourceChanged):
        await kept.digest_units([unit], gone)
    await kept.digest_units([unit], hasher)
    assert hasher.asked == [unit]


class Memory:
    """Hashes what it holds now."""

    def __init__(self, **digests: int) -> None:
        self.digests = digests

    async def __call__(self, units: Sequence[SourceUnit]) -> tuple[Unit, ...]:
        return tuple(Unit(u.group, u.ordinal, u.slot, u.generation, self.digests[f"slot{u.slot}"]) for u in units)


@in_event_loop
async def test_a_recheck_tells_what_is_as_it_was_what_changed_and_what_was_never_known() -> None:
    kept, memory = KeptDigests((10,)), Memory(slot2=2, slot3=3, slot4=4)
    units = [SourceUnit(0, slot, 0, slot, 1) for slot in (2, 3, 4)]
    await kept.digest_units(units[:2], memory)
    memory.digests["slot3"] = 33
    assert await kept.recheck(units, memory) == (True, False, None)
    assert await kept.recheck(units, memory) == (True, False, True)  # known from then on; what changed stays wrong
    (reused,) = await kept.digest_units([replace(units[0], generation=3)], memory)
    assert reused.generation == 3
