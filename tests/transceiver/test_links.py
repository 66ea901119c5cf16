"""Control links: who gets in, what gets through, and how each side learns that the other is gone."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgpack
import pytest
import zmq
from support.event_loop import in_event_loop, until, within
from support.links.unchecked import raw

from disagg.transceiver.wire.codec import PROTOCOL, decode, encode
from disagg.transceiver.wire.connection import Connection
from disagg.transceiver.wire.errors import EndpointRefused, LocalProtocolError, PeerLost, ProtocolDiffers
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlClient, ControlServer
from disagg.transceiver.wire.messages.peer import Heartbeat, Refused
from disagg.transceiver.wire.sockets import Sockets, check_endpoint

KEYS = ClusterKeys.from_secret(b"the secret of the cluster under test")
OTHER_KEYS = ClusterKeys.from_secret(b"the secret of quite another cluster")
OPEN_KEYS = ClusterKeys.published()
ANY_PORT = "tcp://127.0.0.1:0"
REFUSED_S = 0.3  # loopback delivers within milliseconds: this long without a message is a refusal


def beat(number: int) -> Heartbeat:
    return Heartbeat("a" * 32, "b" * 32, (("c" * 32, number),))


@asynccontextmanager
async def a_server(keys: ClusterKeys = KEYS, endpoint: str = ANY_PORT) -> AsyncIterator[ControlServer]:
    server = ControlServer.bind(endpoint, keys)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def a_client(endpoint: str, keys: ClusterKeys = KEYS) -> AsyncIterator[ControlClient]:
    client = await ControlClient.connect(endpoint, keys)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def a_raw_dealer(endpoint: str, keys: ClusterKeys = KEYS) -> AsyncIterator[Connection]:
    """A client that sends any bytes it likes."""
    sockets = Sockets(keys)
    connection = Connection(sockets, endpoint, max_message_nbytes=1 << 30, high_water_mark=100)
    try:
        yield connection
    finally:
        await connection.close()
        sockets.close()


async def send_until_refused(server: ControlServer, peer: bytes, message: Heartbeat) -> None:
    while True:
        await server.send(peer, message)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("keys", [KEYS, OPEN_KEYS], ids=["curve", "insecure"])
@in_event_loop
async def test_messages_go_both_ways_in_order(keys: ClusterKeys) -> None:
    async with a_server(keys) as server, a_client(server.endpoint, keys) as client:
        await within(client.ready())
        for number in range(100):
            await client.send(beat(number))
        received = [await within(server.recv()) for _ in range(100)]
        assert [message for _, message in received] == [beat(number) for number in range(100)]
        peer = received[0][0]
        assert len(peer) == 16
        for number in range(100):
            await server.send(peer, beat(number))
        assert [await within(client.recv()) for _ in range(100)] == [beat(number) for number in range(100)]


@in_event_loop
async def test_each_connection_has_its_own_routing_id() -> None:
    async with a_server() as server:
        peers = set()
        for _ in range(3):
            async with a_client(server.endpoint) as client:
                await within(client.ready())
                await client.send(beat(0))
                peers.add((await within(server.recv()))[0])
        assert len(peers) == 3


@in_event_loop
async def test_sending_before_the_handshake_is_refused_and_not_queued() -> None:
    async with a_client("tcp://127.0.0.1:1") as client:
        with pytest.raises(PeerLost, match="does not answer yet"):
            await client.send(beat(0))


@in_event_loop
async def test_a_client_that_started_first_finds_the_server_that_comes_later() -> None:
    async with a_server() as server:
        endpoint = server.endpoint
    async with a_client(endpoint) as client, a_server(endpoint=endpoint) as server:
        await within(client.ready())
        await client.send(beat(7))
        assert (await within(server.recv()))[1] == beat(7)


@pytest.mark.parametrize(
    ("server_keys", "client_keys"),
    [(KEYS, OTHER_KEYS), (KEYS, OPEN_KEYS), (OPEN_KEYS, KEYS)],
    ids=["other secret", "no curve", "curve to an open server"],
)
@in_event_loop
async def test_a_client_without_the_cluster_secret_is_never_heard(
    server_keys: ClusterKeys, client_keys: ClusterKeys
) -> None:
    async with a_server(server_keys) as server, a_client(server.endpoint, client_keys) as client:
        with pytest.raises(TimeoutError):
            await within(client.ready(), REFUSED_S)
        with pytest.raises(PeerLost):
            await client.send(beat(0))
        with pytest.raises(TimeoutError):
            await within(server.recv(), REFUSED_S)


@in_event_loop
async def test_a_client_with_the_servers_public_key_but_a_pair_of_its_own_is_not_admitted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Knowing whom to call is not enough: this is what the gate adds to CURVE."""
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    public, secret = zmq.curve_keypair()
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.setsockopt(zmq.CURVE_SERVERKEY, KEYS.curve_public)
    stranger.setsockopt(zmq.CURVE_PUBLICKEY, public)
    stranger.setsockopt(zmq.CURVE_SECRETKEY, secret)
    try:
        async with a_server() as server:
            stranger.connect(server.endpoint)
            stranger.send(encode(beat(0)))
            with pytest.raises(TimeoutError):
                await within(server.recv(), REFUSED_S)
            await until(lambda: "does not own this cluster's key" in caplog.text, "the gate says why")
    finally:
        context.destroy(linger=0)


@in_event_loop
async def test_malformed_messages_are_counted_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with a_server() as server, a_raw_dealer(server.endpoint) as raw:
        await within(raw.ready())
        for frames in ([b""], [b"\xff" * 40], [encode(beat(0)), b"more"], [b"", encode(beat(0))]):
            raw.send(frames)
        raw.send([encode(beat(5))])
        assert (await within(server.recv()))[1] == beat(5)
        assert server.num_malformed == 4
    assert "malformed control message" in caplog.text


@in_event_loop
async def test_who_speaks_another_major_version_is_told_both_and_costs_nobody_else() -> None:
    ours, other = PROTOCOL, PROTOCOL[0] + 1
    async with a_server() as server, a_client(server.endpoint) as good, a_raw_dealer(server.endpoint) as raw:
        await within(raw.ready())
        await within(good.ready())
        serving = asyncio.create_task(server.recv())
        raw.send([msgpack.packb([other, 5, 1, {"fields": "of that version"}])])
        answer = decode((await within(raw.receive()))[0].bytes)
        assert answer == Refused("protocol", f"{ours[0]}.{ours[1]}", f"{other}.5")
        await good.send(beat(1))
        assert (await within(serving))[1] == beat(1)


@in_event_loop
async def test_an_answer_of_another_major_version_is_an_error_of_its_own() -> None:
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        await client.send(beat(0))
        peer, _ = await within(server.recv())
        await server._socket.send_multipart([peer, msgpack.packb([PROTOCOL[0] + 1, 0, 3, {}])])
        with pytest.raises(ProtocolDiffers, match=f"peer speaks protocol {PROTOCOL[0] + 1}.0, this process"):
            await within(client.recv())
        await server.send(peer, beat(1))
        assert await within(client.recv()) == beat(1)


@in_event_loop
async def test_a_message_above_the_size_limit_ends_only_the_connection_that_sent_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("disagg.transceiver.wire.links.MAX_MESSAGE_NBYTES", 1000)
    async with a_server() as server, a_client(server.endpoint) as good, a_raw_dealer(server.endpoint) as bad:
        await within(good.ready())
        await within(bad.ready())
        bad.send([b"x" * 10_000])
        await within(bad.lost())
        await good.send(beat(1))
        assert (await within(server.recv()))[1] == beat(1)


@in_event_loop
async def test_a_malformed_answer_does_not_end_the_client() -> None:
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        await client.send(beat(0))
        peer, _ = await within(server.recv())
        await server._socket.send_multipart([peer, b"junk"])
        await server.send(peer, beat(1))
        assert await within(client.recv()) == beat(1)
        assert client.num_malformed == 1


@in_event_loop
async def test_a_message_too_large_is_refused_before_it_is_sent() -> None:
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        with pytest.raises(LocalProtocolError, match="at most"):
            await client.send(raw(Heartbeat, "a" * (17 << 20), "b", ()))


@in_event_loop
async def test_end_of_the_server_is_noticed_at_once_and_is_final() -> None:
    async with a_server(endpoint="tcp://localhost:0") as server, a_client(server.endpoint) as client:
        await within(client.ready())
        waiting = asyncio.create_task(client.recv())
        await asyncio.sleep(0)
        await server.close()
        await within(client.lost())
        with pytest.raises(PeerLost, match="is gone"):
            await within(waiting)
        async with a_server(endpoint=server.endpoint) as successor:  # libzmq alone would reconnect here
            with pytest.raises(PeerLost):
                await client.send(beat(0))
            with pytest.raises(PeerLost):
                await client.recv()
            with pytest.raises(TimeoutError):
                await within(successor.recv(), REFUSED_S)


@in_event_loop
async def test_sending_to_a_client_that_left_raises_peer_lost() -> None:
    async with a_server() as server:
        async with a_client(server.endpoint) as client:
            await within(client.ready())
            await client.send(beat(0))
            peer, _ = await within(server.recv())
        with pytest.raises(PeerLost):
            await within(send_until_refused(server, peer, beat(1)))


@in_event_loop
async def test_a_client_that_reads_nothing_counts_as_lost_when_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("disagg.transceiver.wire.links.HIGH_WATER_MARK", 8)
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        await client.send(beat(0))
        peer, _ = await within(server.recv())
        large = raw(Heartbeat, "a" * 600_000, "b", ())  # the kernel's buffers hold a few MiB and the queue eight more
        with pytest.raises(PeerLost):
            await within(send_until_refused(server, peer, large))


@in_event_loop
async def test_a_receive_that_timed_out_loses_no_message() -> None:
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        for number in range(50):
            with pytest.raises(TimeoutError):
                await within(server.recv(), 0.0)
            await client.send(beat(number))
            assert (await within(server.recv()))[1] == beat(number)


@in_event_loop
async def test_two_ends_can_share_one_context() -> None:
    sockets = Sockets(KEYS)
    server = ControlServer.bind(ANY_PORT, KEYS, sockets)
    client = await ControlClient.connect(server.endpoint, KEYS, sockets)
    await within(client.ready())
    await client.send(beat(3))
    assert (await within(server.recv()))[1] == beat(3)
    await client.close()
    await server.close()
    sockets.close()


@in_event_loop
async def test_closing_leaves_no_file_and_no_thread_and_may_be_repeated() -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count()
    async with a_server() as server, a_client(server.endpoint) as client:
        await within(client.ready())
        await client.close()
        await server.close()
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before


@in_event_loop
async def test_a_port_in_use_is_one_sentence() -> None:
    async with a_server() as server:
        with pytest.raises(EndpointRefused, match=r"cannot listen at .*: Address already in use; choose another port"):
            ControlServer.bind(server.endpoint, KEYS)


@pytest.mark.parametrize(
    "endpoint", ["", "127.0.0.1:1", "ipc:///tmp/x", "tcp://:5", "tcp://h", "tcp://h:99999", "tcp://h:1/p", "http://h:1"]
)
def test_what_is_no_tcp_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(EndpointRefused, match="expected tcp://HOST:PORT"):
        check_endpoint(endpoint, KEYS)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "192.168.0.1", "example.com", "[::]", "[2001:db8::1]"])
def test_insecure_keys_leave_loopback_neither_to_listen_nor_to_connect(host: str) -> None:
    check_endpoint(f"tcp://{host}:5555", KEYS)
    with pytest.raises(EndpointRefused, match="--insecure serves loopback only"):
        check_endpoint(f"tcp://{host}:5555", OPEN_KEYS)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "[::1]"])
def test_insecure_keys_serve_loopback(host: str) -> None:
    check_endpoint(f"tcp://{host}:0", OPEN_KEYS)
