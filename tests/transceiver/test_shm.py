"""What is special to shared memory: who may map a pool, what a hostile peer can show, and what is left behind."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.event_loop import in_event_loop, until, within
from support.links.plane_pair import SHAPES, plane_pair
from support.links.pools import close_pools, make_pool, make_pools

from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.planes.shm import handshake as shm_handshake
from disagg.transceiver.planes.shm import mapping
from disagg.transceiver.planes.shm import plane as shm
from disagg.transceiver.planes.shm.plane import ShmLandingPlane, ShmSourcePlane
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused, RemoteProtocolError, SourceChanged
from disagg.transceiver.wire.messages.values import PlaneOffer

ME = "a" * 32
RUN = [(0, 4, 10), (0, 5, 11)]


async def connect_to(
    answer: Callable[[socket.socket], object], *, pools: Sequence[PoolRegion], nonce: bytes = b"n" * 16
) -> ShmLandingPlane:
    """Connect a reader to a listener that answers the greeting as it likes."""
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind("\0disagg-imposter")
        listener.listen()
        listener.setblocking(False)
        landing = ShmLandingPlane()
        offer = PlaneOffer("shm", "imposter", b"t" * 16, nonce)
        connecting = asyncio.create_task(landing.connect(ME, offer, pools))
        connection, _ = await loop.sock_accept(listener)
        with connection:
            await loop.sock_recv(connection, 4096)
            connection.setblocking(True)
            await asyncio.to_thread(answer, connection)
        try:
            await within(connecting)
        except BaseException:
            await landing.close()
            raise
        return landing


def answer_with(pools: Sequence[PoolRegion], nonce: bytes = b"n" * 16) -> Callable[[socket.socket], None]:
    return lambda sock: shm_handshake.send_pools(sock, nonce, pools)


@in_event_loop
async def test_an_answer_as_it_should_be_is_accepted() -> None:
    """The control of the tests below: their imposter is refused for the one thing it does wrong."""
    pools = make_pools(SHAPES)
    landing = await connect_to(answer_with(pools), pools=pools)
    await landing.close()
    close_pools(pools)


@in_event_loop
async def test_a_listener_that_cannot_show_the_nonce_is_refused() -> None:
    pools = make_pools(SHAPES)
    with pytest.raises(PlaneRefused, match="not the peer that made the offer"):
        await connect_to(answer_with(pools, nonce=b"x" * 16), pools=pools)
    close_pools(pools)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda pool: replace(pool, slots=np.empty((10_000, 4096), np.uint8)), "does not hold what it says"),
        (lambda pool: replace(pool, slots_offset=0), "does not hold what it says"),
        (lambda pool: replace(pool, slots_offset=100), "does not hold what it says"),
        (lambda pool: replace(pool, slots=np.empty((0, 4096), np.uint8)), "does not hold what it says"),
    ],
    ids=["file too short", "slots over generations", "unaligned", "no slots"],
)
@in_event_loop
async def test_a_pool_file_that_does_not_hold_what_the_peer_says_is_never_mapped(
    change: Callable[[PoolRegion], PoolRegion], sentence: str
) -> None:
    pools = make_pools([(24, 4096)])
    with pytest.raises(PlaneRefused, match=sentence):
        await connect_to(answer_with([change(pools[0])]), pools=pools)
    close_pools(pools)


@in_event_loop
async def test_a_pool_that_its_owner_could_shrink_is_never_mapped() -> None:
    pool = make_pool(4, 4096, seals=0x10)  # F_SEAL_FUTURE_WRITE alone
    with pytest.raises(PlaneRefused, match="not sealed against shrinking"):
        await connect_to(answer_with([pool]), pools=[pool])
    close_pools([pool])


@pytest.mark.parametrize(
    "data",
    [b"", b"no", b"HTTP/1.1 400 Bad Request\r\n", b"DSM1\xff\xff\xff\xff", b"DSM1\x01\x00\x00\x00" + bytes(24)],
    ids=["end of file", "short", "another protocol", "too many pools", "no descriptors"],
)
@in_event_loop
async def test_nonsense_instead_of_an_answer_is_refused(data: bytes) -> None:
    pools = make_pools(SHAPES)
    with pytest.raises(PlaneRefused):
        await connect_to(lambda sock: sock.sendall(data), pools=pools)
    close_pools(pools)


@in_event_loop
async def test_a_listener_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "HANDSHAKE_S", 0.05)
    pools = make_pools(SHAPES)
    silent = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stay_silent(sock: socket.socket) -> None:
        asyncio.run_coroutine_threadsafe(silent.wait(), loop).result(5)

    loop.call_later(0.3, silent.set)
    with pytest.raises(PeerLost, match="did not answer within"):
        await connect_to(stay_silent, pools=pools)
    close_pools(pools)


@in_event_loop
async def test_slots_of_another_size_are_refused_with_both_values() -> None:
    async with plane_pair("shm") as pair:
        pools = make_pools([(24, 4096), (10, 2999)])
        with pytest.raises(PlaneRefused, match=r"ours \[4096, 2999\], theirs \[4096, 3000\]"):
            await pair.make_landing().connect(ME, pair.source.offer(ME), pools)
        close_pools(pools)


@pytest.mark.parametrize("data", [b"x" * 100, b"GET / HTTP/1.1\r\n\r\n" * 3, b"DSM1" + bytes(16) + b"\x02\xff\xff"])
@in_event_loop
async def test_who_greets_wrongly_gets_an_end_of_file_and_no_descriptor(data: bytes) -> None:
    async with plane_pair("shm") as pair:
        reader, writer = await asyncio.open_unix_connection("\0disagg-" + pair.source.offer(ME).address)
        writer.write(data)
        assert await within(reader.read()) == b""
        writer.close()
        await pair.move(await pair.receiver(), RUN)


@in_event_loop
async def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "GREETING_S", 0.05)
    async with plane_pair("shm") as pair:
        reader, writer = await asyncio.open_unix_connection("\0disagg-" + pair.source.offer(ME).address)
        assert await within(reader.read()) == b""
        writer.close()


@in_event_loop
async def test_a_crowd_of_silent_connections_keeps_nobody_out() -> None:
    async with plane_pair("shm") as pair:
        assert isinstance(pair.source, shm.ShmSourcePlane)
        address = "\0disagg-" + pair.source.offer(ME).address
        crowd: list[socket.socket] = []
        for _ in range(4):
            for _ in range(90):  # fewer than wait to be accepted
                stranger = socket.socket(socket.AF_UNIX)
                stranger.connect(address)
                crowd.append(stranger)
            await until(lambda: len(pair.source._doors) >= min(len(crowd), shm.MAX_SILENT), "they are accepted")
            await pair.move(await pair.receiver(), RUN)
        assert len(pair.source._silent) <= shm.MAX_SILENT
        for stranger in crowd:
            stranger.close()


@in_event_loop
async def test_another_users_process_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        with monkeypatch.context() as patch:
            patch.setattr(shm, "peer_uid", lambda sock: os.geteuid() + 1)
            with pytest.raises(PlaneRefused):
                await pair.make_landing().connect(ME, pair.source.offer(ME), receiver.pools)
        with monkeypatch.context() as patch:
            patch.setattr(shm_handshake, "peer_uid", lambda sock: os.geteuid() + 1)
            with pytest.raises(PlaneRefused, match="another user"):
                await pair.make_landing().connect(ME, pair.source.offer(ME), receiver.pools)


@in_event_loop
async def test_the_kernel_tells_who_is_at_the_other_end() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert shm_handshake.peer_uid(left) == os.geteuid()


@in_event_loop
async def test_a_pool_outside_host_memory_or_open_to_writers_is_not_offered() -> None:
    pool = make_pool(4, 64, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    for unshareable, sentence in [(replace(pool, fd=-1), "not host memory"), (pool, "not sealed against writers")]:
        with pytest.raises(PlaneRefused, match=sentence):
            await ShmSourcePlane().start([unshareable])
    close_pools([pool])


@in_event_loop
async def test_a_receiver_cannot_write_what_it_mapped() -> None:
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        assert isinstance(receiver.plane, ShmLandingPlane)
        for region in receiver.plane._sources:
            assert not region.slots.flags.writeable
        with pytest.raises(PermissionError):
            mmap.mmap(pair.pools[0].fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
        with pytest.raises(ValueError, match="read-only"):
            receiver.plane._sources[0].slots[0, 0] = 1


@pytest.mark.parametrize("slot", [-1, 24, 2**62, 2**70])
@in_event_loop
async def test_a_source_slot_outside_its_pool_is_the_peers_fault(slot: int) -> None:
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        job = LandingJob("source", "t", 1, 0, (Destination(0, 0, 0, 3, slot, 100),))
        with pytest.raises(RemoteProtocolError):
            receiver.plane.land(job)


@pytest.mark.parametrize("generation", [-1, 0, 103, 2**62])
@in_event_loop
async def test_a_generation_that_never_was_is_a_changed_source(generation: int) -> None:
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        job = LandingJob("source", "t", 1, 0, (Destination(0, 0, 0, 3, 4, generation),))
        with pytest.raises(SourceChanged):
            receiver.plane.land(job)


@in_event_loop
async def test_pages_are_touched_where_the_kernel_cannot_populate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_MADV_POPULATE_READ", 12345)  # EINVAL, as before Linux 5.14
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        await within(pair.move(receiver, RUN))
        assert np.array_equal(receiver.pools[0].slots[10:12], pair.pools[0].slots[4:6])


@in_event_loop
async def test_a_receiver_that_leaves_is_noticed_at_once() -> None:
    async with plane_pair("shm") as pair:
        receiver = await pair.receiver()
        lost: asyncio.Queue[str] = asyncio.Queue()
        pair.source.on_peer_lost = lost.put_nowait
        await receiver.plane.close()
        assert await within(lost.get()) == receiver.incarnation


@in_event_loop
async def test_a_receiver_that_comes_back_replaces_its_old_connection_and_is_not_called_lost() -> None:
    async with plane_pair("shm") as pair:
        lost: list[str] = []
        pair.source.on_peer_lost = lost.append
        first = await pair.receiver(ME)
        second = await pair.receiver(ME)
        with pytest.raises(PeerLost):
            await within(fetch_until_refused(first.plane, pair.job(RUN)))
        await within(pair.move(second, RUN))
        assert lost == []


async def fetch_until_refused(plane: object, job: LandingJob) -> None:
    while True:
        await plane.fetch(job)  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)


SOURCE_PROCESS = """
import asyncio, sys
from support.links.pools import make_pools
from disagg.transceiver.planes.shm.plane import ShmSourcePlane

async def main():
    plane = ShmSourcePlane()
    await plane.start(make_pools([(8, 4096)]))
    offer = plane.offer("a" * 32)
    print(offer.address, offer.token.hex(), offer.nonce.hex(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.processes
@in_event_loop
async def test_a_source_process_that_is_killed_is_noticed_and_its_bytes_stay_readable_until_closed() -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE_PROCESS, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stdout is not None
    address, token, nonce = (await within(process.stdout.readline(), 20)).decode().split()
    pools, expected = make_pools([(8, 4096)], seed=9), make_pools([(8, 4096)])
    landing, lost = ShmLandingPlane(), asyncio.Event()
    landing.on_lost = lost.set
    await landing.connect(ME, PlaneOffer("shm", address, bytes.fromhex(token), bytes.fromhex(nonce)), pools)
    process.send_signal(signal.SIGKILL)
    await within(lost.wait())
    job = LandingJob("source", "t", 1, 0, (Destination(0, 0, 0, 3, 5, 105),))
    with pytest.raises(PeerLost):
        await landing.fetch(job)
    assert landing.land(job) == 4096  # a copy that was running when the source died ends as any other
    assert np.array_equal(pools[0].slots[3], expected[0].slots[5])
    await process.wait()
    await landing.close()
    close_pools([*pools, *expected])
