"""The conformance suite: what every data plane must do. A new plane adds its name to `plane_pair.PLANES`, no test."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loop import in_event_loop, until, within
from support.links.plane_pair import PLANES, SHAPES, PlanePair, Receiver, plane_pair

from disagg.cache.pool import NULL_SLOT, TRASH_SLOT
from disagg.transceiver.layout.runs import adjacent, ints
from disagg.transceiver.memory import copying
from disagg.transceiver.planes import probe
from disagg.transceiver.planes.tcp import sender as tcp_sender
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused, SourceChanged

pytestmark = pytest.mark.parametrize("kind", PLANES)

RUN = [(0, 4, 10), (0, 5, 11), (0, 6, 12)]  # adjacent on both sides


def open_resources() -> tuple[int, list[str]]:
    """Number of open files, names of threads. Dead cycles and the threads of asyncio's own pool do not count."""
    gc.collect()
    threads = sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))
    return len(os.listdir("/proc/self/fd")), threads


def snapshot(receiver: Receiver) -> list[np.ndarray]:
    return [pool.slots.copy() for pool in receiver.pools]


def assert_only_moved(pair: PlanePair, receiver: Receiver, before: list[np.ndarray], pairs: list) -> None:
    """Each destination equals its source, and every other slot is what it was."""
    for pool, source, destination in pairs:
        before[pool][destination] = pair.pools[pool].slots[source]
    for pool, expected in enumerate(before):
        assert np.array_equal(receiver.pools[pool].slots, expected), f"pool {pool}"


@in_event_loop
async def test_slots_of_several_pools_land_exactly_and_nothing_else_changes(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        before = snapshot(receiver)
        pairs = [(0, 23, 0), (1, 9, 3), (1, 2, 4), (0, 7, 23), *RUN, (1, 0, 0)]
        nbytes = await within(pair.move(receiver, pairs))
        assert nbytes == sum(SHAPES[pool][1] for pool, _, _ in pairs)
        assert_only_moved(pair, receiver, before, pairs)


@in_event_loop
async def test_adjacent_slots_are_one_operation(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        await within(pair.move(receiver, RUN))
        assert receiver.plane.num_operations == 1
        await within(pair.move(receiver, [(0, 1, 1), (0, 2, 3), (1, 3, 4), (1, 4, 5)], number=1))
        assert receiver.plane.num_operations == 4


@in_event_loop
async def test_an_empty_slice_lands_nothing(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        before = snapshot(receiver)
        assert await within(pair.move(receiver, [])) == 0
        assert_only_moved(pair, receiver, before, [])


@in_event_loop
async def test_any_pairing_of_slots_lands_exactly(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        rng = np.random.default_rng(7)
        for number in range(30):
            pairs = [
                (pool, int(source), int(destination))
                for pool, (num_slots, _) in enumerate(SHAPES)
                for source, destination in zip(
                    rng.permutation(num_slots)[: num_slots // 2], np.sort(rng.permutation(num_slots)), strict=False
                )
            ]
            before = snapshot(receiver)
            await within(pair.move(receiver, pairs, number=number))
            assert_only_moved(pair, receiver, before, pairs)


@in_event_loop
async def test_a_slot_given_away_before_the_copy_is_refused(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        planned, job = pair.units(RUN), pair.job(RUN)
        pair.pools[0].generations[5] += 1
        with pytest.raises(SourceChanged):
            await within(pair.carry_out(receiver, job, planned))
        await within(pair.move(receiver, RUN, number=1))  # nothing is stuck


@in_event_loop
async def test_a_slot_given_away_during_the_copy_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        copy_slots, copy_rows, write = copying.copy_slots, copying.copy_rows, tcp_sender.write

        def copy_all_while_the_owner_reuses(*what: Any) -> None:
            copy_slots(*what)
            pair.pools[0].generations[6] += 1

        def copy_while_the_owner_reuses(destination: np.ndarray, source: np.ndarray) -> None:
            copy_rows(destination, source)
            pair.pools[0].generations[6] += 1

        def write_while_the_owner_reuses(sock: socket.socket, views: list[memoryview]) -> None:
            write(sock, views)
            pair.pools[0].generations[6] += 1

        monkeypatch.setattr("disagg.transceiver.planes.reading.copy_slots", copy_all_while_the_owner_reuses)
        monkeypatch.setattr("disagg.transceiver.planes.ucx.sender.copy_rows", copy_while_the_owner_reuses)
        monkeypatch.setattr("disagg.transceiver.planes.zmq.source.copy_rows", copy_while_the_owner_reuses)
        monkeypatch.setattr("disagg.transceiver.planes.tcp.sender.write", write_while_the_owner_reuses)
        with pytest.raises(SourceChanged):
            await within(pair.move(receiver, RUN))


@in_event_loop
async def test_a_cancelled_fetch_leaves_nothing_and_can_be_repeated(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        for _ in range(20):
            fetch = asyncio.create_task(receiver.plane.fetch(pair.job(RUN)))
            await asyncio.sleep(0)
            fetch.cancel()
            await asyncio.wait({fetch})
        before = snapshot(receiver)
        await within(pair.move(receiver, RUN))
        assert_only_moved(pair, receiver, before, RUN)


@in_event_loop
async def test_discarded_epochs_do_not_stand_in_the_way_of_later_ones(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        for epoch in range(1, 30):
            if pair.source.sends_bytes:
                await within(pair.source.send(receiver.incarnation, "t", epoch, 0, pair.units(RUN)))
            receiver.plane.discard("t", epoch)
            receiver.plane.discard("t", epoch)
        before = snapshot(receiver)
        await within(pair.move(receiver, RUN, epoch=30))
        assert_only_moved(pair, receiver, before, RUN)


@in_event_loop
async def test_two_receivers_land_at_once_without_mixing(kind: str) -> None:
    async with plane_pair(kind) as pair:
        first, second = await pair.receiver(), await pair.receiver()
        moves = {id(first): RUN, id(second): [(0, 1, 10), (0, 2, 11), (1, 1, 1)]}
        before = {id(receiver): snapshot(receiver) for receiver in (first, second)}
        for number in range(20):
            await within(asyncio.gather(*(pair.move(r, moves[id(r)], number=number) for r in (first, second))))
        for receiver in (first, second):
            assert_only_moved(pair, receiver, before[id(receiver)], moves[id(receiver)])


@in_event_loop
async def test_a_token_opens_the_plane_once_and_only_for_its_peer(kind: str) -> None:
    async with plane_pair(kind) as pair:
        offer = pair.source.offer("a" * 32)
        assert pair.source.offer("a" * 32) == offer  # HELLO is repeated
        first = await pair.receiver("a" * 32)
        for incarnation, bad_offer in [
            ("a" * 32, offer),
            ("b" * 32, offer),
            ("b" * 32, replace(pair.source.offer("b" * 32), token=bytes(16))),
            ("c" * 32, pair.source.offer("b" * 32)),
        ]:
            with pytest.raises(PlaneRefused):
                await pair.make_landing().connect(incarnation, bad_offer, first.pools)
        await within(pair.move(first, RUN))  # the refusals disturbed nobody
        await pair.receiver("b" * 32)  # nor did they use up the right token


@in_event_loop
async def test_a_dropped_peer_hears_of_it_and_its_token_is_void(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver, other = await pair.receiver(), await pair.receiver()
        lost = asyncio.Event()
        receiver.plane.on_lost = lost.set
        unused = pair.source.offer(receiver.incarnation)
        await pair.source.drop(receiver.incarnation)
        await pair.source.drop(receiver.incarnation)
        await within(lost.wait())
        with pytest.raises(PeerLost):
            await receiver.plane.fetch(pair.job(RUN))
        if pair.source.sends_bytes:
            with pytest.raises(PeerLost):
                await pair.source.send(receiver.incarnation, "t", 1, 0, pair.units(RUN))
        with pytest.raises(PlaneRefused):
            await pair.make_landing().connect(receiver.incarnation, unused, receiver.pools)
        await within(pair.move(other, RUN))


@in_event_loop
async def test_the_end_of_the_source_ends_fetches_at_once(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        lost = asyncio.Event()
        receiver.plane.on_lost = lost.set
        await pair.source.close()
        await within(lost.wait())
        with pytest.raises(PeerLost):
            await within(receiver.plane.fetch(pair.job(RUN)))


@in_event_loop
async def test_a_receiver_reconnects_with_a_fresh_token(kind: str) -> None:
    async with plane_pair(kind) as pair:
        first = await pair.receiver("a" * 32)
        await within(pair.move(first, RUN))
        await first.plane.close()
        second = await pair.receiver("a" * 32)
        before = snapshot(second)
        await within(pair.move(second, RUN))
        assert_only_moved(pair, second, before, RUN)


@in_event_loop
async def test_a_source_that_is_not_there_refuses(kind: str) -> None:
    async with plane_pair(kind) as pair:
        offer = pair.source.offer("a" * 32)
        await pair.source.close()
        landing = pair.make_landing()
        with pytest.raises((PlaneRefused, PeerLost)):
            await connect_impatiently(landing, offer, pair)
        await landing.close()


async def connect_impatiently(landing, offer, pair: PlanePair) -> None:
    """zmq retries until its own deadline, which a test need not sit through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("disagg.transceiver.planes.zmq.landing.OPEN_S", 0.2)
        await landing.connect("a" * 32, offer, pair.pools)


@in_event_loop
async def test_a_cancelled_connect_leaves_no_file_behind(kind: str) -> None:
    async with plane_pair(kind) as pair:
        before = open_resources()
        landing = pair.make_landing()
        connecting = asyncio.create_task(landing.connect("b" * 32, pair.source.offer("b" * 32), pair.pools))
        await asyncio.sleep(0.001)
        connecting.cancel()
        await within(asyncio.wait({connecting}))
        await landing.close()
        await pair.source.drop("b" * 32)
        await until(lambda: open_resources() == before, "the source closes its end when it hears of it")


@in_event_loop
async def test_closing_leaves_no_file_and_no_thread(kind: str) -> None:
    async def use() -> None:
        async with plane_pair(kind) as pair:
            receiver = await pair.receiver()
            await within(pair.move(receiver, RUN))
            for _ in range(2):
                await receiver.plane.close()
                await pair.source.close()

    await use()  # pyzmq's collector of sent buffers starts once and stays
    before = open_resources()
    for _ in range(3):
        await use()
    assert open_resources() == before


@in_event_loop
async def test_first_contact_is_measured_with_reserved_slots_and_touches_no_other(kind: str) -> None:
    async with plane_pair(kind) as pair:
        receiver = await pair.receiver()
        for pool in pair.pools:
            pool.generations[NULL_SLOT] = 0
        before = snapshot(receiver)
        assert await within(probe.measure(receiver.plane, receiver.pools)) > 0
        assert_only_moved(pair, receiver, before, [(0, NULL_SLOT, TRASH_SLOT)])
        await within(pair.move(receiver, RUN))  # and nothing is left of it
        assert await within(probe.measure(receiver.plane, ())) == 0.0


@given(
    pools=st.lists(st.integers(0, 1), max_size=12),
    data=st.data(),
)
def test_runs_cover_the_units_in_order_and_are_as_long_as_adjacency_allows(kind: str, pools: list[int], data) -> None:
    del kind
    columns = [data.draw(st.lists(st.integers(0, 6), min_size=len(pools), max_size=len(pools))) for _ in range(2)]
    runs = list(adjacent(ints(pools), *map(ints, columns)))
    assert [unit for start, stop in runs for unit in range(start, stop)] == list(range(len(pools)))

    def joins(left: int) -> bool:
        same_pool = pools[left] == pools[left + 1]
        return same_pool and all(column[left + 1] == column[left] + 1 for column in columns)

    ends = {stop for _, stop in runs}
    assert all((left + 1 not in ends) == joins(left) for left in range(len(pools) - 1))
