"""Where receivers of a plane knock: no socket is lost, and no shortage ends the listening."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from typing import Any

import pytest
from support.event_loop import in_event_loop, within

from disagg.transceiver.planes import door
from disagg.transceiver.planes.door import Door, knock
from disagg.transceiver.planes.greeting import greeting
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.messages.values import PlaneOffer

PEER = "d" * 32


def open_door() -> tuple[Door, int, PlaneOffer, asyncio.Queue[socket.socket]]:
    tokens, guests = OneTimeTokens(), asyncio.Queue[socket.socket]()
    one = Door("tcp", tokens, lambda sock, peer, token: guests.put_nowait(sock))
    port = one.open("127.0.0.1", 0)
    return one, port, PlaneOffer("tcp", f"tcp://127.0.0.1:{port}", tokens.mint(PEER)), guests


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def visit(one: Door, offer: PlaneOffer, guests: asyncio.Queue[socket.socket]) -> None:
    sock = await within(knock(PEER, offer))
    guest = await within(guests.get())
    sock.close()
    guest.close()


@in_event_loop
async def test_a_door_closed_before_a_greeting_began_keeps_no_socket() -> None:
    before = num_descriptors()
    one, port, _, _ = open_door()
    stranger = socket.create_connection(("127.0.0.1", port))
    assert one._listener is not None
    one._accept(one._listener)  # as the loop would; the task that greets has not run a line yet
    await one.close()
    stranger.close()
    assert num_descriptors() == before


@in_event_loop
async def test_without_descriptors_it_pauses_and_then_lets_in_who_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "REST_S", 0.05)
    one, _, offer, guests = open_door()
    listener: Any = one._listener
    failures = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENFILE, "Too many open files in system")]

    class Short:
        """The listener while the process has no descriptor to spare."""

        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return listener.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

    one._loop.remove_reader(listener)
    one._listener = Short()  # type: ignore[assignment]
    one._listen()
    await visit(one, offer, guests)
    assert not failures
    await one.close()


@in_event_loop
async def test_a_door_may_be_closed_twice_and_while_it_pauses() -> None:
    one, port, _, _ = open_door()
    one._rest = one._loop.call_later(0.0, lambda: pytest.fail("it listens again after its end"))
    await one.close()
    await one.close()
    await asyncio.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


# --- strangers ------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave by their number alone, not because a busy machine was slow to make the others."""
    monkeypatch.setattr(door, "GREETING_S", 60.0)


def strangers(port: int, count: int, address: str = "127.0.0.1") -> list[socket.socket]:
    """Connections that say nothing."""
    return [socket.create_connection(("127.0.0.1", port), source_address=(address, 0)) for _ in range(count)]


async def settled(one: Door, port: int) -> None:
    """Everything that waits at the door has been accepted."""
    probe = socket.create_connection(("127.0.0.1", port))
    probe.setblocking(False)
    probe.send(b"x" * 400)  # no greeting: it is hung up on
    with contextlib.suppress(ConnectionResetError):
        await within(asyncio.get_running_loop().sock_recv(probe, 1))
    probe.close()


@pytest.mark.parametrize("said", [b"", b"DSM1", b"DSM1" + bytes(16)], ids=["silent", "slow", "slower"])
@in_event_loop
async def test_a_crowd_of_silent_connections_keeps_nobody_out(said: bytes, silent_for_long: None) -> None:
    one, port, offer, guests = open_door()
    crowd: list[socket.socket] = []
    for _ in range(5):
        crowd += strangers(port, 60)
        for stranger in crowd[-60:]:
            stranger.send(said)
        await visit(one, PlaneOffer("tcp", offer.address, one._tokens.mint(PEER)), guests)
    assert len(one._visitors) <= door.MAX_SILENT_PER_ADDRESS
    await one.close()
    for stranger in crowd:
        stranger.close()


@in_event_loop
async def test_connections_of_one_address_are_dropped_for_it_and_not_for_others(silent_for_long: None) -> None:
    one, port, offer, guests = open_door()
    quiet = strangers(port, 1, "127.0.0.2")
    await settled(one, port)
    crowd = strangers(port, 200, "127.0.0.3")
    await settled(one, port)
    origins = [visitor.origin for visitor in one._visitors]
    assert origins.count("127.0.0.2") == 1
    assert origins.count("127.0.0.3") == door.MAX_SILENT_PER_ADDRESS
    await visit(one, offer, guests)
    await one.close()
    for stranger in (*quiet, *crowd):
        stranger.close()


@in_event_loop
async def test_of_many_addresses_the_oldest_silent_connection_leaves_first(silent_for_long: None) -> None:
    one, port, _, _ = open_door()
    crowd = [sock for i in range(2, 202) for sock in strangers(port, 1, f"127.0.0.{i}")]
    await settled(one, port)
    assert [visitor.origin for visitor in one._visitors] == [f"127.0.0.{i}" for i in range(74, 202)]
    await one.close()
    for stranger in crowd:
        stranger.close()


@in_event_loop
async def test_a_token_that_has_arrived_is_not_dropped_for_strangers(silent_for_long: None) -> None:
    """The loop has not heard of it yet: it reads before it drops."""
    one, port, offer, guests = open_door()
    assert one._listener is not None
    one._loop.remove_reader(one._listener)
    honest = socket.create_connection(("127.0.0.1", port))
    one._accept(one._listener)
    crowd = strangers(port, door.MAX_SILENT_PER_ADDRESS)
    honest.send(greeting(PEER, offer.token))
    for _ in crowd:
        one._accept(one._listener)
    assert guests.qsize() == 1
    guests.get_nowait().close()
    await one.close()
    for sock in (honest, *crowd):
        sock.close()


@in_event_loop
async def test_a_silent_connection_is_hung_up_on_in_half_a_second() -> None:
    one, port, _, _ = open_door()
    (stranger,) = strangers(port, 1)
    stranger.setblocking(False)
    assert door.GREETING_S == 0.5
    assert await within(asyncio.get_running_loop().sock_recv(stranger, 1)) == b""
    assert not one._visitors
    assert not one._from
    stranger.close()
    await one.close()


@in_event_loop
async def test_a_receiver_that_was_dropped_knocks_again() -> None:
    one, _, offer, guests = open_door()
    hear, dropped = one._hear, list[Any]()

    def drop_the_first(visitor: Any) -> None:
        if dropped:
            hear(visitor)
        else:
            dropped.append(visitor)
            one._drop(visitor)

    one._hear = drop_the_first  # type: ignore[method-assign]
    await visit(one, offer, guests)
    await one.close()


@in_event_loop
async def test_a_guest_that_cannot_be_served_costs_its_own_connection() -> None:
    one, _, offer, guests = open_door()

    def no_thread(sock: socket.socket, peer: str, token: bytes) -> None:
        raise RuntimeError("can't start new thread")

    welcome, one._on_guest = one._on_guest, no_thread
    before = num_descriptors()
    sock = await within(knock(PEER, offer))
    assert await within(asyncio.get_running_loop().sock_recv(sock, 1)) == b""
    sock.close()
    assert num_descriptors() == before
    one._on_guest = welcome
    await visit(one, PlaneOffer("tcp", offer.address, one._tokens.mint(PEER)), guests)
    await one.close()


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    assert door._origin("2001:db8::1") == door._origin("2001:db8::ffff:2") != door._origin("2001:db8:1::1")
    assert door._origin("fe80::1%eth0") == door._origin("fe80::2")
    assert door._origin("10.0.0.1") != door._origin("10.0.0.2")
