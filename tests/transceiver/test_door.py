"""Where receivers of a plane knock: no socket is lost, and no shortage ends the listening."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest
from support.event_loop import in_event_loop, within

from disagg.transceiver.planes import door
from disagg.transceiver.planes.door import Door, knock
from disagg.transceiver.planes.tokens import Tokens
from disagg.transceiver.wire.messages.values import PlaneOffer

PEER = "d" * 32


def open_door() -> tuple[Door, int, PlaneOffer, asyncio.Queue[socket.socket]]:
    tokens, guests = Tokens(), asyncio.Queue[socket.socket]()
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
