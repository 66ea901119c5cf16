"""What is special to the zmq plane: bytes on a wire, credit, and data that nobody asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loop import in_event_loop, until, within
from support.links.counting_proxy import CountingProxy
from support.links.flipping_proxy import FlippingProxy
from support.links.plane_pair import KEYS, SHAPES, PlanePair, Receiver, plane_pair
from support.links.pools import make_pools
from support.links.zmtp_proxy import ZmtpProxy

from disagg.transceiver.planes.zmq import frames
from disagg.transceiver.planes.zmq import landing as zmq_landing
from disagg.transceiver.planes.zmq.frames import WINDOW, Credit, DataHello, SliceHead, pack, parse
from disagg.transceiver.planes.zmq.landing import ZmqLandingPlane
from disagg.transceiver.planes.zmq.source import ZmqSourcePlane
from disagg.transceiver.wire.connection import Connection
from disagg.transceiver.wire.errors import LocalProtocolError, PeerLost, PlaneRefused, RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.sockets import Sockets

PAIRS = [(0, 4, 10), (1, 5, 1), (0, 6, 12)]
BLOCKED_S = 0.2  # a send that has credit takes a millisecond


@asynccontextmanager
async def behind(pair: PlanePair, proxy: ZmtpProxy) -> AsyncIterator[Receiver]:
    """A receiver whose connection runs through `proxy`."""
    async with proxy.running():
        landing = ZmqLandingPlane(pair.keys)
        receiver = Receiver(landing, make_pools(SHAPES, seed=55))
        pair.receivers.append(receiver)
        offer = replace(pair.source.offer(receiver.incarnation), address=proxy.endpoint)
        await within(landing.connect(receiver.incarnation, offer, receiver.pools))
        yield receiver
        await landing.close()


def address(pair: PlanePair) -> str:
    return pair.source.offer("probe").address


@in_event_loop
async def test_payload_crosses_the_wire_once_and_is_the_slots_and_no_more() -> None:
    async with plane_pair("zmq-insecure") as pair:
        proxy = CountingProxy(address(pair))
        async with behind(pair, proxy) as receiver:
            landed = [await within(pair.move(receiver, PAIRS, number=number)) for number in range(5)]
            assert landed == [sum(SHAPES[pool][1] for pool, _, _ in PAIRS)] * 5
            assert proxy.payload_nbytes == sum(landed)
            assert proxy.num_payload_frames == 5


@pytest.mark.parametrize("at", [0, -1])
@in_event_loop
async def test_a_byte_flipped_in_flight_reaches_the_destination_for_the_digest_to_find(at: int) -> None:
    async with plane_pair("zmq-insecure") as pair:
        proxy = FlippingProxy(address(pair), at=at)
        async with behind(pair, proxy) as receiver:
            await within(pair.move(receiver, PAIRS))
            assert proxy.num_flipped == 1
            sent = np.concatenate([pair.pools[pool].slots[slot] for pool, slot, _ in PAIRS])
            landed = np.concatenate([receiver.pools[pool].slots[slot] for pool, _, slot in PAIRS])
            assert np.flatnonzero(sent != landed).tolist() == [at % len(sent)]


@in_event_loop
async def test_with_curve_a_byte_flipped_in_flight_ends_the_connection_and_lands_nothing() -> None:
    async with plane_pair("zmq") as pair:
        proxy = FlippingProxy(address(pair), at=-1)
        async with behind(pair, proxy) as receiver:
            lost = asyncio.Event()
            receiver.plane.on_lost = lost.set
            before = [pool.slots.copy() for pool in receiver.pools]
            with pytest.raises(PeerLost):
                await within(pair.move(receiver, PAIRS))
            assert proxy.num_flipped == 1
            await within(lost.wait())
            assert all(np.array_equal(pool.slots, old) for pool, old in zip(receiver.pools, before, strict=True))


@in_event_loop
async def test_a_sender_waits_while_its_receiver_holds_a_full_window() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        for number in range(WINDOW):
            await within(pair.source.send(receiver.incarnation, "t", 1, number, pair.units(PAIRS)))
        waiting = asyncio.create_task(pair.source.send(receiver.incarnation, "t", 1, WINDOW, pair.units(PAIRS)))
        assert not (await asyncio.wait({waiting}, timeout=BLOCKED_S))[0]
        job = pair.job(PAIRS, number=3)
        await within(receiver.plane.fetch(job))
        await asyncio.to_thread(receiver.plane.land, job)
        await within(waiting)


@in_event_loop
async def test_a_sender_that_waits_for_credit_hears_that_its_receiver_was_dropped() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        sends = [
            asyncio.create_task(pair.source.send(receiver.incarnation, "t", 1, number, pair.units(PAIRS)))
            for number in range(WINDOW + 3)
        ]
        done, waiting = await asyncio.wait(sends, timeout=BLOCKED_S)
        assert (len(done), len(waiting)) == (WINDOW, 3)
        await pair.source.drop(receiver.incarnation)
        outcomes = await within(asyncio.gather(*waiting, return_exceptions=True))
        assert all(isinstance(outcome, PeerLost) for outcome in outcomes)


@in_event_loop
async def test_a_cancelled_send_gives_its_credit_back() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        for _ in range(3 * WINDOW):
            send = asyncio.create_task(pair.source.send(receiver.incarnation, "t", 1, 0, pair.units(PAIRS)))
            await asyncio.sleep(0)  # it holds credit and gathers
            send.cancel()
            await asyncio.wait({send})
        for number in range(2 * WINDOW):
            await within(pair.move(receiver, PAIRS, number=number, epoch=2))


@in_event_loop
async def test_the_sender_hears_of_a_receiver_that_left_by_its_next_send() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        lost: list[str] = []
        pair.source.on_peer_lost = lost.append
        await receiver.plane.close()
        with pytest.raises(PeerLost):
            await within(send_forever(pair, receiver))
        assert lost == [receiver.incarnation]


async def send_forever(pair: PlanePair, receiver: Receiver) -> None:
    while True:
        await pair.source.send(receiver.incarnation, "t", 1, 0, pair.units(PAIRS))


@in_event_loop
async def test_slices_that_nobody_asks_for_expire_and_free_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_landing, "KEEP_S", 0.05)
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        plane = receiver.plane
        assert isinstance(plane, ZmqLandingPlane)
        for number in range(WINDOW + 1):
            await within(pair.source.send(receiver.incarnation, "forgotten", 1, number, pair.units(PAIRS)))
        await until(lambda: plane.num_discarded == WINDOW + 1, "each of them expired")
        monkeypatch.setattr(zmq_landing, "KEEP_S", 60)  # what is asked for now may be asked for late
        await within(pair.move(receiver, PAIRS))


@in_event_loop
async def test_slices_may_arrive_before_they_are_fetched_and_out_of_order() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        jobs = [pair.job([(0, slot, slot + 10)], number=slot) for slot in range(5)]
        early = asyncio.create_task(receiver.plane.fetch(jobs[4]))
        for slot in (3, 1, 4, 0, 2):
            await pair.source.send(receiver.incarnation, "t", 1, slot, pair.units([(0, slot, slot + 10)]))
        await within(early)
        for job in jobs:
            await within(receiver.plane.fetch(job))
            receiver.plane.land(job)
        assert np.array_equal(receiver.pools[0].slots[10:15], pair.pools[0].slots[:5])


@in_event_loop
async def test_a_slice_of_the_wrong_size_is_the_peers_fault_and_frees_the_window() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        for number in range(2 * WINDOW):
            await within(pair.source.send(receiver.incarnation, "t", 1, number, pair.units(PAIRS[:1])))
            job = pair.job(PAIRS, number=number)
            await within(receiver.plane.fetch(job))
            with pytest.raises(RemoteProtocolError, match="4096 bytes, its units"):
                receiver.plane.land(job)


@in_event_loop
async def test_landing_what_was_never_fetched_is_this_processs_fault() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        with pytest.raises(LocalProtocolError, match="not fetched"):
            receiver.plane.land(pair.job(PAIRS))


@in_event_loop
async def test_nonsense_from_a_connected_peer_is_counted_and_disturbs_nobody() -> None:
    async with plane_pair("zmq") as pair:
        assert isinstance(pair.source, ZmqSourcePlane)
        receiver = await pair.receiver()
        sockets = Sockets(KEYS)
        stranger = Connection(sockets, address(pair), max_message_nbytes=1 << 20, high_water_mark=100)
        await within(stranger.ready())
        nonsense = [[b""], [b"?"], [b"H"], [b"C"], [b"S"], [b"a", b"b"], [pack(Credit(9))], [b"H" + b"\xff" * 40]]
        for message in [*nonsense, [pack(SliceHead("t", 1, 0, 0))]]:
            stranger.send(message)
        stranger.send([pack(DataHello(receiver.incarnation, bytes(16)))])
        assert [frame.bytes for frame in await within(stranger.receive())] == [frames.REFUSED]
        assert pair.source.num_malformed == len(nonsense) + 1
        await within(pair.move(receiver, PAIRS))
        await stranger.close()
        sockets.close()


@pytest.mark.parametrize("at", [0, 4, 8, 20, -5, -1])
@in_event_loop
async def test_a_damaged_head_of_a_slice_ends_the_connection_at_once(at: int) -> None:
    """Kind, epoch, number, length, transfer, checksum: whoever waits for the slice must not wait for a deadline."""
    async with plane_pair("zmq-insecure") as pair:
        proxy = FlippingProxy(address(pair), at=at, min_nbytes=20)
        proxy.is_armed = False
        async with behind(pair, proxy) as receiver:
            await within(pair.move(receiver, PAIRS))
            proxy.is_armed = True
            with pytest.raises(PeerLost):
                await within(pair.move(receiver, PAIRS, number=1))
            assert proxy.num_flipped == 1
            assert isinstance(receiver.plane, ZmqLandingPlane)
            assert receiver.plane.num_malformed == 1


@in_event_loop
async def test_a_damaged_word_of_a_receiver_ends_its_connection_at_both_ends() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        assert isinstance(receiver.plane, ZmqLandingPlane)
        lost: list[str] = []
        pair.source.on_peer_lost = lost.append
        receiver.plane._connection.send([pack(Credit(1))[:-1] + b"?"])
        with pytest.raises(PeerLost):
            await within(receiver.plane.fetch(pair.job(PAIRS)))
        assert lost == [receiver.incarnation]
        with pytest.raises(PeerLost):
            await pair.source.send(receiver.incarnation, "t", 2, 0, pair.units(PAIRS))


@in_event_loop
async def test_credit_beyond_what_was_taken_buys_nothing() -> None:
    async with plane_pair("zmq") as pair:
        receiver = await pair.receiver()
        assert isinstance(receiver.plane, ZmqLandingPlane)
        assert isinstance(pair.source, ZmqSourcePlane)
        taken: list[object] = []
        take = pair.source._take
        pair.source._take = lambda route, head: (taken.append(head), take(route, head))  # type: ignore[method-assign]
        receiver.plane._connection.send([pack(Credit(1000))])
        while not taken:  # noqa: ASYNC110 - it is read when it is read
            await asyncio.sleep(0.001)
        sends = [
            asyncio.create_task(pair.source.send(receiver.incarnation, "t", 2, number, pair.units(PAIRS)))
            for number in range(WINDOW + 1)
        ]
        assert len((await asyncio.wait(sends, timeout=BLOCKED_S))[0]) == WINDOW
        await pair.source.drop(receiver.incarnation)
        await asyncio.wait(sends)
        assert isinstance(sends[-1].exception(), PeerLost)


@in_event_loop
async def test_a_receiver_of_another_cluster_cannot_open_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_landing, "OPEN_S", 0.3)
    async with plane_pair("zmq") as pair:
        landing = ZmqLandingPlane(ClusterKeys.from_secret(b"the secret of quite another cluster"))
        with pytest.raises(PeerLost, match="did not answer within"):
            await landing.connect("a" * 32, pair.source.offer("a" * 32), pair.pools)


@in_event_loop
async def test_an_offer_with_a_bad_address_is_refused_with_a_sentence() -> None:
    async with plane_pair("zmq") as pair:
        offer = replace(pair.source.offer("a" * 32), address="tcp://nowhere")
        with pytest.raises(PlaneRefused, match="expected tcp://HOST:PORT"):
            await pair.make_landing().connect("a" * 32, offer, pair.pools)


def test_the_advertised_address_is_what_peers_are_told() -> None:
    async def main() -> None:
        plane = ZmqSourcePlane("127.0.0.1", KEYS, advertised_host="::1", advertised_port=7)
        await plane.start(())
        assert plane.offer("a").address == "tcp://[::1]:7"
        await plane.close()

    asyncio.run(main())


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        head = parse(data)
    except RemoteProtocolError:
        return
    assert parse(pack(head)) == head


@given(st.text(max_size=40), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_heads_come_back_as_they_were(transfer_id: str, epoch: int, number: int, nbytes: int) -> None:
    for head in (
        SliceHead(transfer_id, epoch, number, nbytes),
        Credit(number),
        DataHello("x" + transfer_id, b"t" * 16),
    ):
        assert parse(pack(head)) == head
