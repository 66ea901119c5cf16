"""What is special to the ucx plane: staging, tags, deaths in the middle, and a machine without ucxx."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loop import in_event_loop, until, within
from support.links.plane_pair import KEYS, Receiver, plane_pair
from support.links.pools import close_pools, make_pool
from xxhash import xxh3_64_intdigest

from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.hashing import Hasher
from disagg.transceiver.memory.regions import Destination, LandingJob
from disagg.transceiver.planes import door, greeting
from disagg.transceiver.planes.slice_stream import split_address
from disagg.transceiver.planes.ucx import library as ucx_library
from disagg.transceiver.planes.ucx import receiver as ucx_receiving
from disagg.transceiver.planes.ucx.frames import CHUNK_NBYTES, chunk_tag, chunks, transfer_bits
from disagg.transceiver.planes.ucx.landing import UcxLandingPlane
from disagg.transceiver.planes.ucx.source import UcxSourcePlane
from disagg.transceiver.wire.errors import (
    EndpointRefused,
    LocalProtocolError,
    PeerLost,
    PlaneRefused,
    RemoteProtocolError,
    SourceChanged,
)
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.worker.plane_classes import landing_planes, source_planes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed")

PAIRS = [(0, 4, 10), (1, 5, 1), (0, 6, 12)]
NBYTES = 2 * (1 << 12) + 3000


def receiver_of(receiver: Receiver) -> Any:
    return receiver_of_plane(receiver.plane)


def receiver_of_plane(plane: Any) -> Any:
    return plane._receiver


@in_event_loop
async def test_slices_of_many_chunks_land_however_slots_and_chunks_meet() -> None:
    slot_nbytes = CHUNK_NBYTES // 3 + 100
    pools, landing_pools = [(make_pool(30, slot_nbytes, seed=seed),) for seed in (1, 2)]
    source, landing = UcxSourcePlane("127.0.0.1", KEYS), UcxLandingPlane()
    await source.start(pools)
    await landing.connect("a" * 32, source.offer("a" * 32), landing_pools)
    rng = np.random.default_rng(3)
    for number in range(6):
        order, to = rng.permutation(30)[:11].tolist(), rng.permutation(30)[:11].tolist()
        units = [SourceUnit(0, i, 0, slot, 100 + slot) for i, slot in enumerate(order)]
        job = LandingJob("source", "t", 1, number, tuple(Destination(0, i, 0, slot) for i, slot in enumerate(to)))
        sending = asyncio.create_task(source.send("a" * 32, "t", 1, number, units))
        await within(landing.fetch(job))
        await within(sending)
        assert await asyncio.to_thread(landing.land, job) == 11 * slot_nbytes
        assert np.array_equal(landing_pools[0].slots[to], pools[0].slots[order])
    assert "tcp/lo" in landing.lane  # named, and only the device that nobody else reaches
    await landing.close()
    await source.close()
    close_pools((*pools, *landing_pools))


@in_event_loop
async def test_units_of_several_pools_are_copied_and_hashed_in_one_pass() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        job = pair.job(PAIRS)
        sending = asyncio.create_task(pair.source.send(receiver.incarnation, "t", 1, 0, pair.units(PAIRS)))
        await within(receiver.plane.fetch(job))
        await within(sending)
        hasher = Hasher(job, receiver.pools, ["bfloat16", "bfloat16"])
        plane: Any = receiver.plane
        assert await asyncio.to_thread(plane.land, job, hasher.copy) == NBYTES
        for landed, (pool, source, to) in zip(hasher.landed(), PAIRS, strict=True):
            assert np.array_equal(receiver.pools[pool].slots[to], pair.pools[pool].slots[source])
            assert landed.digest == xxh3_64_intdigest(pair.pools[pool].slots[source].tobytes())


@in_event_loop
async def test_a_sender_waits_while_nobody_lands_and_goes_on_when_somebody_does() -> None:
    pools, landing_pools = [(make_pool(4, 1 << 20, seed=seed),) for seed in (1, 2)]
    source, landing = UcxSourcePlane("127.0.0.1", KEYS), UcxLandingPlane()
    await source.start(pools)
    await landing.connect("a" * 32, source.offer("a" * 32), landing_pools)
    units = [SourceUnit(0, i, 0, i, 100 + i) for i in range(4)]
    num_slices = 2 * ucx_receiving.MAX_ROWS + 8
    sends = [asyncio.create_task(source.send("a" * 32, "t", 1, n, units)) for n in range(num_slices)]
    await until(lambda: receiver_of_plane(landing).num_held >= ucx_receiving.MAX_ROWS, "staging is full")
    await asyncio.sleep(0.05)
    num_sent = sum(send.done() for send in sends)
    assert ucx_receiving.MAX_ROWS <= num_sent < num_slices, "staging is bounded"
    for number in range(num_slices):
        job = LandingJob("source", "t", 1, number, tuple(Destination(0, i, 0, i) for i in range(4)))
        await within(landing.fetch(job))
        await asyncio.to_thread(landing.land, job)
    await within(asyncio.gather(*sends))
    await landing.close()
    await source.close()
    close_pools((*pools, *landing_pools))


@in_event_loop
async def test_slices_that_nobody_asks_for_are_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_receiving, "KEEP_S", 0.05)
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        for number in range(ucx_receiving.MAX_ROWS + 3):
            await within(pair.source.send(receiver.incarnation, "forgotten", 1, number, pair.units(PAIRS)))
        await until(
            lambda: receiver_of(receiver).num_discarded == ucx_receiving.MAX_ROWS + 3, "each of them is dropped"
        )
        monkeypatch.setattr(ucx_receiving, "KEEP_S", 60)  # what is asked for now may be asked for late
        await within(pair.move(receiver, PAIRS))


@in_event_loop
async def test_a_fetch_cancelled_while_its_bytes_come_leaves_its_slots_alone_and_its_row_free() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        before = [pool.slots.copy() for pool in receiver.pools]
        for number in range(3 * ucx_receiving.MAX_ROWS):
            fetch = asyncio.create_task(receiver.plane.fetch(pair.job(PAIRS, epoch=number)))
            send = asyncio.create_task(pair.source.send(receiver.incarnation, "t", number, 0, pair.units(PAIRS)))
            await asyncio.sleep(0.0003 * (number % 5))
            fetch.cancel()
            await asyncio.wait({fetch})
            receiver.plane.discard("t", number)
            await within(send)
        await within(pair.move(receiver, PAIRS[:1], epoch=99))
        assert receiver_of(receiver).num_held == 0
        before[0][10] = pair.pools[0].slots[4]
        assert all(np.array_equal(pool.slots, was) for pool, was in zip(receiver.pools, before, strict=True))


@in_event_loop
async def test_a_slice_of_the_wrong_size_is_the_peers_fault_and_the_next_one_lands() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        await within(pair.source.send(receiver.incarnation, "t", 1, 0, pair.units(PAIRS[:1])))
        with pytest.raises(RemoteProtocolError, match=f"4096 bytes, its units {NBYTES}"):
            await within(receiver.plane.fetch(pair.job(PAIRS)))
        await within(pair.move(receiver, PAIRS, number=1))


@in_event_loop
async def test_a_slot_given_away_before_its_turn_sends_nothing() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        planned = pair.units(PAIRS)
        pair.pools[0].generations[6] += 1
        with pytest.raises(SourceChanged):
            await within(pair.source.send(receiver.incarnation, "t", 1, 0, planned))
        await asyncio.sleep(0.05)
        assert receiver_of(receiver).num_held == 0


@in_event_loop
async def test_strangers_get_nothing_and_disturb_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        monkeypatch.setattr(door, "GREETING_S", 0.1)
        host, port = split_address(pair.source.offer("x").address)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 3, greeting.greeting("x", bytes(16)), b"DSM1" + b"\xff" * 40):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(said)
            with contextlib.suppress(ConnectionResetError):
                assert await within(reader.read()) == b""
            writer.close()
        await within(pair.move(receiver, PAIRS))


@pytest.mark.parametrize("noise", [b"C", b"PP", b"\x00", b"C" * 4000])
@in_event_loop
async def test_a_receiver_that_speaks_out_of_turn_is_hung_up_on(noise: bytes) -> None:
    async with plane_pair("ucx") as pair:
        receiver, other = await pair.receiver(), await pair.receiver()
        lost: asyncio.Queue[str] = asyncio.Queue()
        pair.source.on_peer_lost = lost.put_nowait
        receiver_of(receiver)._sock.send(noise)
        assert await within(lost.get()) == receiver.incarnation
        await within(pair.move(other, PAIRS))


@pytest.mark.parametrize("noise", [b"\xff" * 32, b"\x00" * 400])
@in_event_loop
async def test_a_source_that_writes_noise_is_lost(noise: bytes) -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        lost = asyncio.Event()
        receiver.plane.on_lost = lost.set
        sender: Any = pair.source
        sender._senders[receiver.incarnation]._sock.send(noise)
        await within(lost.wait())
        with pytest.raises(PeerLost):
            await receiver.plane.fetch(pair.job(PAIRS))


@in_event_loop
async def test_a_ucx_that_cannot_connect_is_found_before_the_plane_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.transceiver.planes.ucx.thread.HANDSHAKE_S", 0.3)
    async with plane_pair("ucx") as pair:
        with monkeypatch.context() as patch:
            patch.setattr("disagg.transceiver.planes.ucx.port.Port.send", lambda *message: None)
            receiver = Receiver(pair.make_landing(), (make_pool(24, 1 << 12, seed=9), make_pool(10, 3000, seed=9)))
            pair.receivers.append(receiver)
            offer = pair.source.offer(receiver.incarnation)
            with pytest.raises(PeerLost):
                await within(receiver.plane.connect(receiver.incarnation, offer, receiver.pools))
        await within(pair.move(await pair.receiver(), PAIRS))


@in_event_loop
async def test_landing_what_was_never_fetched_is_this_processs_fault() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        with pytest.raises(LocalProtocolError, match="not fetched"):
            receiver.plane.land(pair.job(PAIRS))


@in_event_loop
async def test_an_offer_with_a_bad_address_is_refused_with_a_sentence() -> None:
    async with plane_pair("ucx") as pair:
        for address in ("nowhere", "tcp://nowhere", "tcp://127.0.0.1:99999"):
            offer = replace(pair.source.offer("a" * 32), address=address)
            with pytest.raises(PlaneRefused, match="cannot connect to"):
                await pair.make_landing().connect("a" * 32, offer, pair.pools)


@in_event_loop
async def test_without_a_secret_it_listens_on_loopback_only() -> None:
    with pytest.raises(EndpointRefused, match="loopback"):
        await UcxSourcePlane("10.0.0.1", ClusterKeys.published()).start(())


def test_without_ucxx_the_plane_is_refused_by_name_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_library, "_is_installed", lambda package: False)
    with pytest.raises(EndpointRefused, match=r"plane ucx needs .* pip install 'disagg\[ucx-cu12\]'"):
        landing_planes(["shm", "ucx"], keys=KEYS)
    with pytest.raises(EndpointRefused, match="leave ucx out"):
        source_planes(["ucx"], host="127.0.0.1", advertised_host="127.0.0.1", keys=KEYS)
    assert list(landing_planes(["shm", "zmq"], keys=KEYS)) == ["shm", "zmq"]


def test_an_operators_variable_wins_over_what_is_chosen_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    assert ucx_library.settings(is_loopback=True) == {**ucx_library.SETTINGS, "NET_DEVICES": "lo"}
    monkeypatch.setenv("UCX_TLS", "tcp")
    assert "TLS" not in ucx_library.settings(is_loopback=False)


@given(st.integers(0, 5 * CHUNK_NBYTES))
def test_chunks_cover_a_slice_once(nbytes: int) -> None:
    parts = chunks(nbytes)
    assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
    assert (parts[0][0], parts[-1][1]) == (0, nbytes) if nbytes else parts == []
    assert all(0 < stop - start <= CHUNK_NBYTES for start, stop in parts)


@given(*[st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1), st.integers(0, 2**12 - 1))] * 2)
def test_tags_differ_where_anything_differs_and_fit_64_bits(one: tuple, other: tuple) -> None:
    assert (chunk_tag(*one) == chunk_tag(*other)) == (one == other)
    assert 0 <= chunk_tag(*one) < 1 << 64


def test_a_transfers_bits_need_the_token() -> None:
    name = (b"t" * 16, 3)
    seen = {transfer_bits(bytes([i] * 16), name) for i in range(200)} | {transfer_bits(bytes(16), (b"u" * 16, 3))}
    assert len(seen) == 201


# --- deaths in the middle --------------------------------------------------------------------------------------


CHILD = """
import asyncio, json, sys
from support.links.pools import make_pool
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import Destination, LandingJob
from disagg.transceiver.planes.ucx.source import UcxSourcePlane
from disagg.transceiver.planes.ucx.landing import UcxLandingPlane

KEYS = ClusterKeys.from_secret(b"the secret of the planes under test")
POOLS = (make_pool(8, 1 << 20, seed=1),)
ME = "c" * 32

async def send():
    source = UcxSourcePlane("127.0.0.1", KEYS)
    await source.start(POOLS)
    offer = source.offer(ME)
    print(json.dumps([offer.address, offer.token.hex()]), flush=True)
    while ME not in source._senders:
        await asyncio.sleep(0.01)
    number = 0
    while True:
        await source.send(ME, "t", 1, number, [SourceUnit(0, i, 0, i, 100 + i) for i in range(8)])
        number += 1

async def land():
    address, token = json.loads(sys.stdin.readline())
    plane = UcxLandingPlane()
    await plane.connect(ME, PlaneOffer("ucx", address, bytes.fromhex(token)), POOLS)
    number = 0
    while True:
        job = LandingJob("source", "t", 1, number, tuple(Destination(0, i, 0, i) for i in range(8)))
        await plane.fetch(job)
        await asyncio.to_thread(plane.land, job)
        number += 1

asyncio.run(send() if sys.argv[1] == "send" else land())
"""


@contextlib.contextmanager
def child(role: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD, role]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def killed(process: subprocess.Popen[str], lost: asyncio.Event) -> float:
    """Seconds from kill -9 to word of it."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    process.send_signal(signal.SIGKILL)
    await within(lost.wait())
    return loop.time() - since


@pytest.mark.processes
@in_event_loop
async def test_a_killed_sender_is_lost_at_once_and_every_receive_completes() -> None:
    pools = (make_pool(8, 1 << 20, seed=2),)
    plane, lost = UcxLandingPlane(), asyncio.Event()
    plane.on_lost = lost.set
    with child("send") as process:
        assert process.stdout is not None
        address, token = json.loads(await asyncio.to_thread(process.stdout.readline))
        await plane.connect("c" * 32, PlaneOffer("ucx", address, bytes.fromhex(token)), pools)
        for number in range(20):
            job = LandingJob("source", "t", 1, number, tuple(Destination(0, i, 0, i) for i in range(8)))
            await within(plane.fetch(job))
            await asyncio.to_thread(plane.land, job)
        job = replace(job, number=10_000)
        waiting = asyncio.create_task(plane.fetch(job))
        await asyncio.sleep(0.001)
        assert await killed(process, lost) < 1
        with pytest.raises(PeerLost):
            await within(waiting)
    receiver = plane._receiver
    assert receiver is not None
    await within(plane.close())
    assert not receiver._thread.is_alive()
    close_pools(pools)


@pytest.mark.processes
@in_event_loop
async def test_a_killed_receiver_is_lost_at_once_and_every_send_completes() -> None:
    pools = (make_pool(8, 1 << 20, seed=2),)
    source, lost = UcxSourcePlane("127.0.0.1", KEYS), asyncio.Event()
    source.on_peer_lost = lambda peer: lost.set()
    await source.start(pools)
    with child("land") as process:
        assert process.stdin is not None
        offer = source.offer("c" * 32)
        process.stdin.write(f'["{offer.address}", "{offer.token.hex()}"]\n')
        process.stdin.flush()
        async with asyncio.timeout(30):
            while "c" * 32 not in source._senders:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        units = [SourceUnit(0, i, 0, i, 100 + i) for i in range(8)]
        for number in range(20):
            await within(source.send("c" * 32, "t", 1, number, units))
        sends = [asyncio.create_task(source.send("c" * 32, "t", 1, 20 + n, units)) for n in range(200)]
        await asyncio.sleep(0.005)
        assert await killed(process, lost) < 1
        outcomes = await within(asyncio.gather(*sends, return_exceptions=True))
        assert any(isinstance(outcome, PeerLost) for outcome in outcomes)
    await within(source.close())
    close_pools(pools)


@in_event_loop
async def test_a_socket_that_breaks_loses_the_plane_while_ucx_itself_lives() -> None:
    async with plane_pair("ucx") as pair:
        receiver = await pair.receiver()
        lost: asyncio.Queue[str] = asyncio.Queue()
        pair.source.on_peer_lost = lost.put_nowait
        here = asyncio.Event()
        receiver.plane.on_lost = here.set
        receiver_of(receiver)._sock.shutdown(socket.SHUT_RDWR)
        await within(here.wait())
        assert await within(lost.get()) == receiver.incarnation
