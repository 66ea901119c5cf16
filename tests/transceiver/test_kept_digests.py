from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.event_loop import in_event_loop

from disagg.transceiver.layout.units import HashedUnit, SourceUnit
from disagg.transceiver.memory.kept_digests import KeptDigests
from disagg.transceiver.wire.errors import SourceChanged


class Hasher:
    """Digests that tell which hash they came from."""

    def __init__(self) -> None:
        self.asked: list[SourceUnit] = []

    async def __call__(self, units: Sequence[SourceUnit]) -> tuple[HashedUnit, ...]:
        self.asked += units
        return tuple(
            HashedUnit(u.group, u.ordinal, u.pool, u.slot, u.generation, 2**63 + len(self.asked)) for u in units
        )


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
    async def gone(units: Sequence[SourceUnit]) -> tuple[HashedUnit, ...]:
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

    async def __call__(self, units: Sequence[SourceUnit]) -> tuple[HashedUnit, ...]:
        return tuple(
            HashedUnit(u.group, u.ordinal, u.pool, u.slot, u.generation, self.digests[f"slot{u.slot}"]) for u in units
        )


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


class Held(Hasher):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()

    async def __call__(self, units: Sequence[SourceUnit]) -> tuple[HashedUnit, ...]:
        found = await super().__call__(units)
        await self.may_go.wait()
        return found


@in_event_loop
async def test_who_waits_for_a_hash_keeps_what_it_knew_when_a_slot_is_given_away_meanwhile() -> None:
    kept, hasher, held = KeptDigests((10,)), Hasher(), Held()
    known, unknown = SourceUnit(0, 1, 0, 1, 1), SourceUnit(0, 2, 0, 2, 1)
    (before,) = await kept.digest_units([known], hasher)
    waiting = asyncio.create_task(kept.digest_units([known, unknown], held))
    await asyncio.sleep(0)
    await kept.digest_units([replace(known, generation=3)], hasher)
    held.may_go.set()
    assert (await waiting)[0] == before


@in_event_loop
async def test_a_recheck_compares_with_what_another_one_kept_while_it_hashed() -> None:
    kept, held, unit = KeptDigests((10,)), Held(), SourceUnit(0, 1, 0, 1, 1)
    waiting = asyncio.create_task(kept.recheck([unit], held))
    await asyncio.sleep(0)
    await kept.digest_units([unit], Hasher())
    held.may_go.set()
    assert await waiting == (True,)


@in_event_loop
async def test_a_slot_cut_into_units_is_hashed_once_and_has_a_digest_for_each() -> None:
    asked: list[SourceUnit] = []

    async def by_halves(slots: Sequence[SourceUnit]) -> tuple[HashedUnit, ...]:
        asked.extend(slots)
        return tuple(
            HashedUnit(s.group, 2 * s.ordinal + half, s.pool, s.slot, s.generation, 10 * s.slot + half)
            for s in slots
            for half in (0, 1)
        )

    kept, first, other = KeptDigests((10,), 2), SourceUnit(0, 3, 0, 4, 1), SourceUnit(0, 4, 0, 5, 1)
    alone = await kept.digest_units([first], by_halves)
    both = await kept.digest_units([other, first], by_halves)
    assert asked == [first, other]
    assert both[2:] == alone
    assert [(unit.ordinal, unit.slot, unit.digest) for unit in both] == [(8, 5, 50), (9, 5, 51), (6, 4, 40), (7, 4, 41)]
