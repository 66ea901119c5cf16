"""What is special to the tcp plane: bytes straight into slots, connections that end in the middle, and strangers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loop import in_event_loop, until, within
from support.links.plane_pair import KEYS, PlanePair, Receiver, plane_pair
from support.links.pools import close_pools, make_pool

from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import Destination, LandingJob
from disagg.transceiver.planes import door, greeting
from disagg.transceiver.planes.greeting import parse_greeting
from disagg.transceiver.planes.slice_stream import HEADER, WELCOME, SliceHeader, advance, split_address, wire_name
from disagg.transceiver.planes.tcp import landing as tcp_landing
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane
from disagg.transceiver.planes.tcp.source import TcpSourcePlane
from disagg.transceiver.wire.errors import (
    EndpointRefused,
    LocalProtocolError,
    PeerLost,
    PlaneRefused,
    RemoteProtocolError,
    SourceChanged,
)
from disagg.transceiver.wire.keys import ClusterKeys

PAIRS = [(0, 4, 10), (1, 5, 1), (0, 6, 12)]
NBYTES = 2 * (1 << 12) + 3000


class FakeSource:
    """Speaks the sender's side of the wire by hand."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    async def admit(self, receiver: Receiver, pair: PlanePair) -> socket.socket:
        """Connect `receiver`; the socket to write slices on."""
        offer = replace(pair.source.offer(receiver.incarnation), address=self.address)
        connecting = asyncio.create_task(receiver.plane.connect(receiver.incarnation, offer, receiver.pools))
        loop = asyncio.get_running_loop()
        sock, _ = await loop.sock_accept(self._listener)
        assert parse_greeting(await loop.sock_recv(sock, 512)) == (receiver.incarnation, offer.token)
        sock.setblocking(True)
        sock.sendall(WELCOME)
        await connecting
        self._listener.close()
        return sock


def new_receiver(pair: PlanePair) -> Receiver:
    receiver = Receiver(TcpLandingPlane(), tuple(make_pool(*pool.slots.shape, seed=99) for pool in pair.pools))
    pair.receivers.append(receiver)
    return receiver


def header(number: int = 0, nbytes: int = NBYTES, transfer_id: str = "t", epoch: int = 1) -> bytes:
    return SliceHeader(wire_name(transfer_id, epoch), number, nbytes).pack()


@in_event_loop
async def test_slices_of_many_megabytes_land_while_they_are_sent() -> None:
    pools, landing_pools = [(make_pool(8, 1 << 20, seed=seed),) for seed in (1, 2)]
    source, landing = TcpSourcePlane("127.0.0.1", KEYS), TcpLandingPlane()
    await source.start(pools)
    await landing.connect("a" * 32, source.offer("a" * 32), landing_pools)
    order = [3, 0, 1, 2, 7, 5, 6, 4]
    units = [SourceUnit(0, i, 0, slot, 100 + slot) for i, slot in enumerate(order)]
    job = LandingJob("source", "t", 1, 0, tuple(Destination(0, i, 0, i) for i in range(8)))
    sending = asyncio.create_task(source.send("a" * 32, "t", 1, 0, units))
    await within(landing.fetch(job))
    await within(sending)
    assert landing.land(job) == 8 << 20
    assert np.array_equal(landing_pools[0].slots, pools[0].slots[order])
    await landing.close()
    await source.close()
    close_pools((*pools, *landing_pools))


@in_event_loop
async def test_a_fetch_cancelled_in_the_middle_writes_no_more_and_the_rest_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_landing, "WAKE_NBYTES", 1)
    async with plane_pair("tcp") as pair:
        receiver = new_receiver(pair)
        sock = await FakeSource().admit(receiver, pair)
        payload = bytes(NBYTES)
        fetch = asyncio.create_task(receiver.plane.fetch(pair.job(PAIRS)))
        sock.sendall(header() + payload[:5000])
        while receiver.pools[0].slots[10].any():  # noqa: ASYNC110 - until the first slot is zero
            await asyncio.sleep(0.001)
        fetch.cancel()
        await asyncio.wait({fetch})
        receiver.pools[0].slots[12] = 7
        job = pair.job([(0, 1, 20)], number=1)
        next_fetch = asyncio.create_task(receiver.plane.fetch(job))
        sock.sendall(payload[5000:] + header(1, 4096) + b"\x05" * 4096)
        await within(next_fetch)
        assert (receiver.pools[0].slots[12] == 7).all()
        assert (receiver.pools[0].slots[20] == 5).all()
        sock.close()


@pytest.mark.parametrize("sent", [b"", header()[:9], header() + bytes(100)])
@in_event_loop
async def test_the_end_of_a_connection_ends_a_waiting_fetch_wherever_it_comes(sent: bytes) -> None:
    async with plane_pair("tcp") as pair:
        receiver = new_receiver(pair)
        sock = await FakeSource().admit(receiver, pair)
        lost = asyncio.Event()
        receiver.plane.on_lost = lost.set
        fetch = asyncio.create_task(receiver.plane.fetch(pair.job(PAIRS)))
        sock.sendall(sent)
        await asyncio.sleep(0.02)
        sock.close()
        with pytest.raises(PeerLost):
            await within(fetch)
        await within(lost.wait())


@in_event_loop
async def test_a_slice_of_the_wrong_size_is_the_peers_fault_and_the_next_one_lands() -> None:
    async with plane_pair("tcp") as pair:
        receiver = new_receiver(pair)
        sock = await FakeSource().admit(receiver, pair)
        sock.sendall(header(0, 4096) + bytes(4096))
        with pytest.raises(RemoteProtocolError, match=f"4096 bytes, its units {NBYTES}"):
            await within(receiver.plane.fetch(pair.job(PAIRS)))
        sock.sendall(header(1) + bytes(NBYTES))
        await within(receiver.plane.fetch(pair.job(PAIRS, number=1)))
        sock.close()


@in_event_loop
async def test_a_slice_larger_than_any_plan_ends_the_connection() -> None:
    async with plane_pair("tcp") as pair:
        receiver = new_receiver(pair)
        sock = await FakeSource().admit(receiver, pair)
        lost = asyncio.Event()
        receiver.plane.on_lost = lost.set
        sock.sendall(header(nbytes=(1 << 32) - 1))
        await within(lost.wait())
        sock.close()


@in_event_loop
async def test_slices_that_nobody_asks_for_are_thrown_away_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_landing, "KEEP_S", 0.05)
    async with plane_pair("tcp") as pair:
        receiver = await pair.receiver()
        plane = receiver.plane
        assert isinstance(plane, TcpLandingPlane)
        for number in range(3):
            await within(pair.source.send(receiver.incarnation, "forgotten", 1, number, pair.units(PAIRS)))
        await until(lambda: plane.num_discarded == 3, "each of them is thrown away")
        monkeypatch.setattr(tcp_landing, "KEEP_S", 60)  # what is asked for now may be asked for late
        await within(pair.move(receiver, PAIRS))


@in_event_loop
async def test_a_slot_given_away_before_its_turn_sends_nothing() -> None:
    async with plane_pair("tcp") as pair:
        receiver = await pair.receiver()
        planned = pair.units(PAIRS)
        pair.pools[0].generations[6] += 1
        with pytest.raises(SourceChanged):
            await within(pair.source.send(receiver.incarnation, "t", 1, 0, planned))
        fetch = asyncio.create_task(receiver.plane.fetch(pair.job(PAIRS)))
        assert not (await asyncio.wait({fetch}, timeout=0.05))[0]
        fetch.cancel()
        await asyncio.wait({fetch})


@in_event_loop
async def test_a_receiver_that_hangs_up_is_lost_at_once_even_while_its_sender_waits() -> None:
    async with plane_pair("tcp") as pair:
        receiver = await pair.receiver()
        lost: asyncio.Queue[str] = asyncio.Queue()
        pair.source.on_peer_lost = lost.put_nowait
        # Nobody fetches: the kernel's buffers fill, and the sending thread blocks.
        sends = [
            asyncio.create_task(pair.source.send(receiver.incarnation, "t", 1, n, pair.units(PAIRS)))
            for n in range(2000)
        ]
        await asyncio.wait(sends, timeout=0.2)
        await receiver.plane.close()
        assert await within(lost.get()) == receiver.incarnation
        await pair.source.drop(receiver.incarnation)
        outcomes = await within(asyncio.gather(*sends, return_exceptions=True))
        assert any(isinstance(outcome, PeerLost) for outcome in outcomes)


@in_event_loop
async def test_strangers_get_nothing_and_disturb_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with plane_pair("tcp") as pair:
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


@in_event_loop
async def test_landing_what_was_never_fetched_is_this_processs_fault() -> None:
    async with plane_pair("tcp") as pair:
        receiver = await pair.receiver()
        with pytest.raises(LocalProtocolError, match="not fetched"):
            receiver.plane.land(pair.job(PAIRS))


@in_event_loop
async def test_an_offer_with_a_bad_address_is_refused_with_a_sentence() -> None:
    async with plane_pair("tcp") as pair:
        for address in ("nowhere", "tcp://nowhere", "tcp://127.0.0.1:99999"):
            offer = replace(pair.source.offer("a" * 32), address=address)
            with pytest.raises(PlaneRefused, match="cannot connect to"):
                await pair.make_landing().connect("a" * 32, offer, pair.pools)


@in_event_loop
async def test_without_a_secret_it_listens_on_loopback_only() -> None:
    with pytest.raises(EndpointRefused, match="loopback"):
        await TcpSourcePlane("10.0.0.1", ClusterKeys.published()).start(())


@given(st.binary(min_size=16, max_size=16), *[st.integers(0, 2**32 - 1)] * 3, st.integers(0, 8 * HEADER.size - 1))
def test_a_header_parses_to_what_was_packed_unless_a_bit_of_it_is_wrong(
    transfer: bytes, epoch: int, number: int, nbytes: int, bit: int
) -> None:
    header = SliceHeader((transfer, epoch), number, nbytes)
    data = bytearray(header.pack())
    assert SliceHeader.parse(data) == header
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError, match="damaged"):
        SliceHeader.parse(data)


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 60))
def test_advancing_takes_exactly_so_many_bytes_off_the_front(sizes: list[int], nbytes: int) -> None:
    whole = bytes(range(sum(sizes)))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(whole)[at : at + size])
        at += size
    nbytes = min(nbytes, len(whole))
    advance(views, nbytes)
    assert b"".join(views) == whole[nbytes:]
