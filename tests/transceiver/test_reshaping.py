"""Landing between unequal block sizes, on every plane: element by element, digest for digest, in bounded staging."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.event_loop import in_event_loop, within
from support.links.plane_pair import PLANES, PlanePair, plane_pair
from support.links.pools import close_pools, make_pools
from support.links.unchecked import changed

from disagg.transceiver.layout.compatibility import geometry_difference
from disagg.transceiver.layout.units import HashedUnit, SourceUnit, geometry_by_units, peer_unit
from disagg.transceiver.memory import gather as packed
from disagg.transceiver.memory.peer_cuts import PeerCuts
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits, by_group
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.planes import probe, reshaping
from disagg.transceiver.planes.reshaping import ReshapingPlane
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError, SourceChanged
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, UnitName

GROUPS = (
    GroupSemantics(None, 0, 2, 4, (0, 3)),
    GroupSemantics(24, 4, 3, 4, (1, 2)),
    GroupSemantics(8, 0, 2, 4, (4, 5)),
)
POOL_OF_GROUP = (0, 1, 0)  # the first and the last have slots of one size
NUM_SLOTS = 12


def geometry(block_size: int) -> Geometry:
    sizes = tuple(2 * 2 * heads * block_size * 4 * 4 for heads in (2, 3))
    return Geometry(block_size, "float32", GROUPS, sizes)


def make(block_size: int, seed: int) -> tuple[PoolRegion, ...]:
    """Pools of finite random numbers."""
    pools = make_pools([(NUM_SLOTS, nbytes) for nbytes in geometry(block_size).slot_nbytes], seed=seed)
    for pool in pools:
        numbers = pool.slots.view(np.float32)
        numbers[:] = np.random.default_rng(seed).normal(size=numbers.shape).astype(np.float32)
    return pools


def slot_array(pools: tuple[PoolRegion, ...], group: int, block_size: int) -> np.ndarray:
    """`[slot, layer, half, head, token, dim]` of one group, where it lies."""
    semantics = GROUPS[group]
    shape = (NUM_SLOTS, len(semantics.layers), 2, semantics.num_kv_heads, block_size, semantics.head_dim)
    return pools[POOL_OF_GROUP[group]].slots.view(np.float32).reshape(shape)


@dataclass
class Ends:
    pair: PlanePair
    plane: ReshapingPlane
    sources: tuple[PoolRegion, ...]
    destinations: tuple[PoolRegion, ...]
    sizes: tuple[int, int]
    cut: SlotUnits
    landing: LandingThreads

    @property
    def unit(self) -> int:
        return min(self.sizes)

    def units(self, slots: dict[int, list[int]]) -> list[SourceUnit]:
        """Group -> its slots by ordinal, as the sender's units."""
        return [
            SourceUnit(g, o, POOL_OF_GROUP[g], slot, int(self.sources[POOL_OF_GROUP[g]].generations[slot]))
            for g, listed in slots.items()
            for o, slot in enumerate(listed)
        ]

    def job(self, units: list[SourceUnit], tables: dict[int, list[int]], number: int = 0) -> LandingJob:
        per_slot = self.sizes[1] // self.unit
        destinations = []
        for unit in units:
            source = (unit.slot, unit.generation) if self.plane.reads_sources else (-1, -1)
            slot = tables[unit.group][unit.ordinal // per_slot]
            destinations.append(Destination(unit.group, unit.ordinal, POOL_OF_GROUP[unit.group], slot, *source))
        return LandingJob("source", "t", 1, number, tuple(destinations))

    async def send(self, job: LandingJob, units: list[SourceUnit]) -> None:
        if not self.plane.reads_sources:
            packed = self.cut.pack(units)
            await self.pair.source.send("me", job.transfer_id, job.epoch, job.number, packed.units, packed.regions)

    async def move(self, job: LandingJob, units: list[SourceUnit]) -> tuple[Any, ...]:
        await self.send(job, units)
        await self.plane.fetch(job)
        return (await self.landing.submit(job, self.plane)).units


@contextlib.asynccontextmanager
async def ends(kind: str, sender: int, receiver: int) -> AsyncIterator[Ends]:
    async with plane_pair(kind) as pair:
        await pair.source.close()
        sources, destinations = make(sender, 1), make(receiver, 2)
        source = type(pair.source)
        pair.source = {  # type: ignore[assignment]
            "inproc": lambda: source(pair.hub),
            "shm": source,
        }.get(kind, lambda: source("127.0.0.1", pair.keys))()
        await pair.source.start(sources)
        unit = min(sender, receiver)
        plane = ReshapingPlane(pair.make_landing(), geometry(sender), geometry(receiver), destinations)
        landing = LandingThreads(destinations, ["float32"] * len(GROUPS))
        try:
            await plane.connect("me", pair.source.offer("me"), plane.probe_pools)
            cut = SlotUnits(geometry(sender), sources, unit, geometry(receiver))
            yield Ends(pair, plane, sources, destinations, (sender, receiver), cut, landing)
        finally:
            await landing.close()
            await plane.close()
            await pair.source.close()
            close_pools([*sources, *destinations])


SOURCE_SLOTS = {0: [7, 3, 4], 1: [1, 9, 8], 2: [5, 6, 2]}


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize(("sender", "receiver"), [(16, 8), (8, 16), (16, 4), (2, 8)])
@in_event_loop
async def test_every_token_lands_in_its_place_and_nothing_else_changes(kind: str, sender: int, receiver: int) -> None:
    async with ends(kind, sender, receiver) as e:
        num_tokens = 3 * sender if sender > receiver else 2 * receiver + e.unit  # ends inside a coarse block
        slots = SOURCE_SLOTS if sender > receiver else {g: list(range(1 + g, 10 + g)) for g in range(3)}
        tables = {0: [11, 2, 3, 8, 4, 5, 6, 7, 9, 10, 1, 0], 1: list(range(12)), 2: list(range(12))}
        if sender < receiver:
            tables[2] = [9, 10, 11]
            tables[0] = [8, 1, 0]  # groups 0 and 2 share a pool
        else:
            slots = {0: SOURCE_SLOTS[0], 1: SOURCE_SLOTS[1]}
        before = [pool.slots.copy() for pool in e.destinations]
        units = [u for u in e.cut.split(e.units(slots)) if u.ordinal * e.unit < num_tokens]
        landed = await within(e.move(e.job(units, tables), units))
        wanted = make(receiver, 3)
        for pool, old in zip(wanted, before, strict=True):
            pool.slots[:] = old
        for group in slots:
            source, to = slot_array(e.sources, group, sender), slot_array(wanted, group, receiver)
            for token in range(num_tokens):
                from_slot, to_slot = slots[group][token // sender], tables[group][token // receiver]
                to[to_slot, :, :, :, token % receiver] = source[from_slot, :, :, :, token % sender]
        for pool, expected in zip(e.destinations, wanted, strict=True):
            assert np.array_equal(pool.slots, expected.slots)
        close_pools(wanted)
        assert all(unit.finite for unit in landed)
        assert e.plane.num_operations == len(slots)


@pytest.mark.parametrize("kind", PLANES)
@in_event_loop
async def test_sender_and_receiver_hash_the_same_bytes(kind: str) -> None:
    async with ends(kind, 16, 8) as e:
        at_source = LandingThreads(e.sources, ["float32"] * 3)
        mine: tuple[HashedUnit, ...] = await at_source.digest_units(e.units(SOURCE_SLOTS), e.cut)
        await at_source.close()
        units = list(e.cut.split(e.units(SOURCE_SLOTS)))
        assert [(u.group, u.ordinal, u.slot, u.generation) for u in mine] == [
            (u.group, u.ordinal, u.slot, u.generation) for u in units
        ]
        tables = {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 3, 4, 5], 2: [6, 7, 8, 9, 10, 11]}
        landed = await within(e.move(e.job(units, tables), units))
        assert [unit.digest for unit in landed] == [unit.digest for unit in mine]
        assert len({unit.digest for unit in mine}) == len(mine)


@pytest.mark.parametrize("kind", PLANES)
@in_event_loop
async def test_a_nan_is_found_in_the_unit_that_holds_it(kind: str) -> None:
    async with ends(kind, 16, 8) as e:
        slot_array(e.sources, 1, 16)[9, 1, 1, 2, 15, 3] = np.nan
        units = [u for u in e.cut.split(e.units(SOURCE_SLOTS)) if u.group == 1]
        landed = await within(e.move(e.job(units, {1: list(range(6))}), units))
        assert [unit.ordinal for unit in landed if not unit.finite] == [3]


@pytest.mark.parametrize("kind", PLANES)
@in_event_loop
async def test_a_slot_given_away_is_noticed(kind: str) -> None:
    async with ends(kind, 16, 8) as e:
        units = [u for u in e.cut.split(e.units(SOURCE_SLOTS)) if u.group == 0]
        job = e.job(units, {0: list(range(6))})
        e.sources[0].generations[3] += 1
        with pytest.raises(SourceChanged):
            await within(e.move(job, units))
        at_source = LandingThreads(e.sources, ["float32"] * 3)
        with pytest.raises(SourceChanged):
            await at_source.digest_units([SourceUnit(0, 0, 0, 3, 0)], e.cut)
        await at_source.close()


@pytest.mark.parametrize("kind", ["inproc", "shm"])
@in_event_loop
async def test_a_slot_outside_the_senders_pool_is_refused(kind: str) -> None:
    async with ends(kind, 16, 8) as e:
        units = [SourceUnit(0, 0, 0, NUM_SLOTS, 100)]
        with pytest.raises(RemoteProtocolError, match="outside pool 0"):
            await within(e.move(e.job(units, {0: [1]}), units))


@pytest.mark.parametrize("kind", PLANES)
@in_event_loop
async def test_the_probe_measures_a_plane_between_unequal_slots(kind: str) -> None:
    async with ends(kind, 8, 16) as e:
        for pool in e.sources:
            pool.generations[0] = 0  # the reserved slot, which is never given away
        before = [pool.slots.copy() for pool in e.destinations]
        assert await within(probe.measure(e.plane, e.plane.probe_pools)) > 0
        assert all(np.array_equal(pool.slots, old) for pool, old in zip(e.destinations, before, strict=True))


@pytest.mark.parametrize("kind", ["tcp", "zmq"])
@in_event_loop
async def test_staging_is_bounded_and_slices_wait_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for four units, slices of two: the third waits until the first has landed."""
    monkeypatch.setattr(reshaping, "SLICE_NBYTES", 1)
    async with ends(kind, 16, 8) as e:
        units = [u for u in e.cut.split(e.units(SOURCE_SLOTS)) if u.group == 0]
        parts = [units[i : i + 2] for i in (0, 2, 4)]
        jobs = [e.job(part, {0: list(range(6))}, number) for number, part in enumerate(parts)]
        for job, part in zip(jobs, parts, strict=True):
            await e.send(job, part)
        await within(e.plane.fetch(jobs[0]))
        await within(e.plane.fetch(jobs[1]))
        third = asyncio.create_task(e.plane.fetch(jobs[2]))
        await asyncio.sleep(0.05)
        assert not third.done()
        await e.landing.submit(jobs[0], e.plane)
        await within(third)
        await e.landing.submit(jobs[2], e.plane)
        e.plane.discard("t", 1)  # the second was fetched and never landed
        assert e.plane._staging._free[0] == [0, 1, 2, 3]
        with pytest.raises(LocalProtocolError):
            await asyncio.to_thread(e.plane.land, jobs[1])
        with pytest.raises(RemoteProtocolError, match="does not fit in staging"):
            await within(e.plane.fetch(e.job(units, {0: list(range(6))}, 9)))


@pytest.mark.parametrize("kind", ["tcp", "ucx", "zmq"])
@in_event_loop
async def test_slices_announced_late_find_room_that_later_ones_have_asked_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for four slices; of eight on their way the last four are asked for first, as when announcements are lost."""
    monkeypatch.setattr(reshaping, "SLICE_NBYTES", 1)
    async with ends(kind, 32, 8) as e:
        units = [u for u in e.cut.split(e.units(SOURCE_SLOTS)) if u.group == 0][:8]
        jobs = [e.job([unit], {0: list(range(8))}, number) for number, unit in enumerate(units)]

        async def receive(job: LandingJob) -> None:
            await e.plane.fetch(job)
            await e.landing.submit(job, e.plane)

        async with asyncio.TaskGroup() as tasks:
            for job, unit in zip(jobs, units, strict=True):
                tasks.create_task(within(e.send(job, [unit])))
            late = [tasks.create_task(within(receive(job))) for job in jobs[4:]]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in late) or kind == "zmq"
            for job in jobs[:4]:
                tasks.create_task(within(receive(job)))
        assert sorted(e.plane._staging._free[0]) == [0, 1, 2, 3]


@in_event_loop
async def test_a_cancelled_wait_for_staging_leaves_no_row_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshaping, "SLICE_NBYTES", 1)
    staging = reshaping._Staging((64,))
    held = await staging.take([0, 0, 0])
    waiting, behind = (asyncio.create_task(staging.take([0] * count)) for count in (2, 1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    staging.give(held)
    assert len(await within(behind)) == 1
    held = await staging.take([0, 0, 0])
    late = asyncio.create_task(staging.take([0, 0]))
    await asyncio.sleep(0)
    staging.give(held)
    late.cancel()  # its rows were granted just now, and nobody will take them
    await asyncio.gather(late, return_exceptions=True)
    staging.give(behind.result())
    assert sorted(staging._free[0]) == [0, 1, 2, 3]


@in_event_loop
async def test_the_loss_of_the_source_is_passed_on() -> None:
    async with ends("tcp", 16, 8) as e:
        lost = asyncio.Event()
        e.plane.on_lost = lost.set
        await e.pair.source.drop("me")
        await within(lost.wait())


@in_event_loop
async def test_numbers_beyond_the_receivers_format_are_counted_with_the_job_that_stored_them() -> None:
    sizes = tuple(nbytes // 2 for nbytes in geometry(8).slot_nbytes)
    theirs, ours = (replace(geometry(8), kv_dtype=dtype, slot_nbytes=sizes) for dtype in ("bfloat16", "float16"))
    sources, destinations = (make_pools([(NUM_SLOTS, nbytes) for nbytes in sizes]) for _ in range(2))
    for pool in sources:
        pool.slots[:] = 0
    torch.from_numpy(sources[0].slots[3]).view(torch.bfloat16)[5] = 1e6
    async with plane_pair("inproc") as pair:
        await pair.source.start(sources)
        plane = ReshapingPlane(pair.make_landing(), theirs, ours, destinations)
        await plane.connect("me", pair.source.offer("me"), plane.probe_pools)
        landing = LandingThreads(destinations, ["float16"] * 3, num_threads=2)
        jobs = [
            LandingJob("source", "t", 1, slot, (Destination(0, slot, 0, slot, slot, 100 + slot),)) for slot in (3, 4, 5)
        ]
        landed = await within(asyncio.gather(*(landing.submit(job, plane) for job in jobs)))
        assert [one.num_saturated for one in landed] == [1, 0, 0]
        assert plane.cut.num_saturated == 1
        assert torch.from_numpy(destinations[0].slots[3]).view(torch.float16)[5] == torch.finfo(torch.float16).max
        await landing.close()
        await plane.close()
    close_pools([*sources, *destinations])


def test_two_threads_that_convert_at_once_count_each_number_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)
    really_narrow = packed.narrow

    def narrow(*args: Any) -> Any:
        both.wait()  # neither has counted yet
        found = really_narrow(*args)
        both.wait()
        return found

    monkeypatch.setattr(packed, "narrow", narrow)
    sizes = tuple(nbytes // 2 for nbytes in geometry(8).slot_nbytes)
    theirs, ours = (replace(geometry(8), kv_dtype=dtype, slot_nbytes=sizes) for dtype in ("bfloat16", "float16"))
    pools = make_pools([(NUM_SLOTS, nbytes) for nbytes in sizes])
    cut = SlotUnits(ours, pools, 8, theirs, is_sender=False)
    rows = torch.full((1, cut.unit_nbytes[0] // 2), 1e6, dtype=torch.bfloat16).view(torch.uint8).numpy()
    with ThreadPoolExecutor(2) as threads:
        counts = threads.map(lambda slot: cut.scatter(0, np.array([0]), np.array([slot]), rows), (3, 4))
        assert list(counts) == [rows.shape[1] // 2] * 2
    assert cut.num_saturated == rows.shape[1]
    close_pools(pools)


# --- names and geometries -----------------------------------------------------------------------------------------


def test_units_of_a_slot_and_slots_of_units() -> None:
    pools = make(16, 1)
    cut = SlotUnits(geometry(16), pools, 4)
    (first, *_, last) = cut.split([SourceUnit(1, 2, 1, 5, 7)])
    assert (first.ordinal, last.ordinal, last.slot, last.generation) == (8, 11, 5, 7)
    names = [UnitName(0, 7), UnitName(0, 4), UnitName(1, 8)]
    assert cut.blocks(names) == (UnitName(0, 1), UnitName(1, 2))
    assert [list(r) for r in by_group(cut.split([SourceUnit(1, 2, 1, 5, 7), SourceUnit(0, 0, 0, 1, 1)]))] == [
        [0, 4],
        [4, 8],
    ]
    assert list(by_group([])) == []
    close_pools(pools)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_units_of_every_format_keep_every_bit(dtype: str) -> None:
    """Any bytes, gathered from slots of 16 and scattered into slots of 4, and back."""
    nbytes = {"float32": 4, "float8_e4m3fn": 1}.get(dtype, 2)
    coarse, fine = (
        Geometry(size, dtype, GROUPS, tuple(2 * 2 * heads * size * 4 * nbytes for heads in (2, 3))) for size in (16, 4)
    )
    sources, middle, back = (
        make_pools([(NUM_SLOTS, slot) for slot in one.slot_nbytes], seed=seed)
        for seed, one in enumerate((coarse, fine, coarse))
    )
    ordinals, slots = np.arange(8), np.array([5, 5, 5, 5, 2, 2, 2, 2])
    a, b = SlotUnits(coarse, sources, 4, fine), SlotUnits(fine, middle, 4, coarse, is_sender=False)
    c, d = SlotUnits(fine, middle, 4, coarse), SlotUnits(coarse, back, 4, fine, is_sender=False)
    for group, pool in enumerate(POOL_OF_GROUP):
        rows = a.gather(group, ordinals, slots)
        b.scatter(group, ordinals, ordinals + 3, rows)
        d.scatter(group, ordinals, slots, c.gather(group, ordinals, ordinals + 3))
        assert np.array_equal(back[pool].slots[[5, 2]], sources[pool].slots[[5, 2]])
    close_pools([*sources, *middle, *back])


@in_event_loop
async def test_each_geometry_of_peers_has_one_cut_whose_digests_and_counts_outlive_them() -> None:
    pools = make(16, 1)
    cuts = PeerCuts(geometry(16), pools)
    assert cuts.of_peer(geometry(16)) == (None, cuts.kept)
    cut, kept = cuts.of_peer(geometry(8))
    assert cuts.of_peer(geometry(8)) == (cut, kept) != cuts.of_peer(geometry(4))
    assert cut is not None
    landing = LandingThreads(pools, ["float32"] * 3)
    slots = [SourceUnit(0, 0, 0, 5, int(pools[0].generations[5]))]
    hash_units = functools.partial(landing.digest_units, cut=cut)
    first = await kept.digest_units(slots, hash_units)
    assert [unit.ordinal for unit in first] == [0, 1]
    slot_array(pools, 0, 16)[5] += 1  # as memory that has changed by itself: what was hashed is what is sent along
    assert await kept.digest_units(slots, hash_units) == first
    halves = tuple(nbytes // 2 for nbytes in geometry(16).slot_nbytes)
    half, _ = cuts.of_peer(replace(geometry(16), kv_dtype="float16", slot_nbytes=halves))
    slot_array(pools, 0, 16)[5, 0, 0, 0, 0, 0] = 1e6
    assert half is not None
    half.pack(slots)
    assert cuts.num_saturated == 1
    await landing.close()
    close_pools(pools)


ONES = (1.0, 1.0)


def test_block_sizes_may_differ_where_one_divides_the_other() -> None:
    assert geometry_difference(geometry(16), geometry(8)) is None
    assert geometry_difference(geometry(8), geometry(16)) is None
    assert geometry_difference(geometry(16), geometry(16)) is None


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("block_size", geometry(24)),
        ("block_size", changed(geometry(8), block_size=0)),
        ("kv_dtype", replace(geometry(8), kv_dtype="float64")),
        ("slot_nbytes", replace(geometry(8), kv_dtype="bfloat16")),
        ("kv_scales", replace(geometry(8), kv_scales=(((ONES, ONES), (ONES, ONES)), (), ()))),
        ("slot_nbytes", replace(geometry(8), slot_nbytes=geometry(4).slot_nbytes)),
        ("slot_nbytes", replace(geometry(32), slot_nbytes=tuple(n + 1 for n in geometry(32).slot_nbytes))),
        ("tensor_parallel_size", replace(geometry(8), tensor_parallel_size=2)),
        ("pipeline_parallel_size", replace(geometry(8), pipeline_parallel_size=2)),
        ("slot_layout", replace(geometry(8), slot_layout="layer-kv-token-head-dim")),
        ("groups", replace(geometry(8), groups=GROUPS[:2])),
    ],
)
def test_what_is_not_converted_is_refused_by_name(field: str, theirs: Geometry) -> None:
    found = geometry_difference(geometry(16), theirs)
    assert found is not None
    assert found[0] == field


def test_groups_of_two_dtypes_pair_only_with_their_like() -> None:
    mixed = replace(geometry(16), kv_dtype="bfloat16,float32")
    assert geometry_difference(mixed, mixed) is None
    assert (geometry_difference(mixed, replace(geometry(8), kv_dtype=mixed.kv_dtype)) or ("",))[0] == "block_size"


def test_what_the_cores_plan_by() -> None:
    assert geometry_by_units(geometry(16), 4) == geometry(4)
    assert (peer_unit(geometry(16), 0), peer_unit(geometry(16), 8), peer_unit(geometry(8), 32)) == (16, 8, 8)
    with pytest.raises(RemoteProtocolError, match="16 and 24"):
        peer_unit(geometry(16), 24)


# --- sending ------------------------------------------------------------------------------------------------------
