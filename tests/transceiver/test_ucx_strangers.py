"""What UCX's own ports give to a process that showed no token. Each attack has a control in which it succeeds."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.event_loop import in_event_loop, within
from support.links.plane_pair import plane_pair
from support.links.ucx_stranger import WRITTEN

import disagg
from disagg.transceiver.memory.regions import Bytes
from disagg.transceiver.planes.ucx import port as ucx_port
from disagg.transceiver.planes.ucx import strangers
from disagg.transceiver.planes.ucx.port import Port
from disagg.transceiver.wire.errors import PeerLost

TESTS = Path(__file__).parents[1]
HELD = b"our data"
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"),
]


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port(is_loopback=True, watched=())
    yield port
    port.close()


def stranger(*told: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "support.links.ucx_stranger", *map(str, told)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )


def attacked(port: Port, process: subprocess.Popen[str]) -> str:
    """What the stranger read, while `port` goes on as its thread would."""
    with process:
        until = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < until:
            port.turn(0.05)
        process.kill()
        assert process.stdout is not None
        return process.stdout.read().partition("\n")[0]  # UCX's warnings follow


def memory() -> Bytes:
    return np.frombuffer(bytearray(HELD), dtype=np.uint8)


def number_of(port: Port) -> int:
    (fd,) = port._own_ports._fds
    return strangers._listening()[fd]


def test_while_its_port_is_open_one_frame_of_ucx_tcp_overwrites_memory(port: Port) -> None:
    """The control, and why the port is closed: neither a key nor a feature is asked for."""
    ours = memory()
    attacked(port, stranger("frame", number_of(port), ours.ctypes.data))
    assert bytes(ours) == WRITTEN


def test_when_its_port_is_closed_the_same_frame_reaches_nobody(port: Port) -> None:
    ours = memory()
    port.shut_out_strangers()
    attacked(port, stranger("frame", number_of(port), ours.ctypes.data))
    assert bytes(ours) == HELD


def test_an_endpoint_of_ucx_gets_and_puts_in_vain_even_while_the_port_is_open(port: Port) -> None:
    ours = memory()
    read = attacked(port, stranger("endpoint", port.address.hex(), ours.ctypes.data))
    assert bytes(ours) == HELD
    assert read == bytes(len(HELD)).hex()


def test_with_the_feature_that_we_leave_out_it_gets_and_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., tuple[object, ...]] = ucx_port.features
    monkeypatch.setattr(ucx_port, "features", lambda core: (*plain(core), core.Feature.RMA))
    port, ours = Port(is_loopback=True, watched=()), memory()
    read = attacked(port, stranger("endpoint", port.address.hex(), ours.ctypes.data))
    port.close()
    assert (read, bytes(ours)) == (HELD.hex(), WRITTEN)


def test_no_context_is_made_anywhere_else() -> None:
    root = Path(disagg.__file__).parent
    makers = [path.name for path in root.rglob("*.py") if "UCXContext(" in path.read_text()]
    assert makers == ["port.py"]


@in_event_loop
async def test_both_ends_of_a_connected_plane_are_closed_to_strangers_and_open_to_each_other() -> None:
    pairs = [(0, slot, slot) for slot in range(20)]
    async with plane_pair("ucx") as pair:
        before = strangers._listening()
        receiver = await pair.receiver()
        ports = [number for fd, number in strangers._listening().items() if before.get(fd) != number]
        assert len(ports) == 2
        await within(pair.move(receiver, pairs))
        for number, region in ((number, pools[0]) for number in ports for pools in (pair.pools, receiver.pools)):
            held = region.slots.copy()
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(socket.create_connection, ("127.0.0.1", number), 0.3)
            with stranger("frame", number, region.slots.ctypes.data) as process:
                await asyncio.to_thread(process.wait)
            assert (region.slots == held).all()
        await within(pair.move(receiver, pairs, number=1))


def test_a_kernel_that_cannot_close_a_port_makes_the_plane_unusable() -> None:
    left, right = socket.socketpair()
    right.close()
    left.close()
    with pytest.raises(PeerLost, match="cannot be closed to strangers"):
        strangers.drop_all(left)
