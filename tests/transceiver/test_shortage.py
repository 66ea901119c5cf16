"""Without descriptors a link is not ready, the others go on, and it is ready when there is room again."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from support.event_loop import in_event_loop
from support.links.transfer_pair import KEYS

from disagg.transceiver.peers import link as peer_link
from disagg.transceiver.peers.link import PeerLink
from disagg.transceiver.wire import sockets as wire_sockets
from disagg.transceiver.wire.connection import Connection
from disagg.transceiver.wire.errors import PeerLost, Shortage
from disagg.transceiver.wire.sockets import Sockets

TESTS = Path(__file__).parents[1]


@pytest.mark.processes
@pytest.mark.parametrize("plane", ["shm", "tcp", "ucx", "zmq"])
def test_running_out_of_descriptors_costs_the_new_link_and_no_other(plane: str) -> None:
    if plane == "ucx" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    command = [sys.executable, "-m", "support.cluster.short_of_files", plane, *map(str, (0, 1, 2, 5, 7, 9))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])  # UCX logs its own errors to stdout before
    assert [one["old"] for one in told["tries"]] == ["ready"] * len(told["tries"])
    assert told["tries"][0]["state"] == "lost"
    assert "Too many open files; raise the limit" in told["tries"][0]["detail"]
    assert (told["old"], told["back"]) == ("ready", "ready")


@in_event_loop
async def test_a_connection_without_room_for_its_socket_is_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_sockets, "MAX_SOCKETS", 2)  # the gate and libzmq itself take them
    sockets = Sockets(KEYS)
    with pytest.raises(Shortage, match="cannot be opened now: Too many open files; raise the limit"):
        Connection(sockets, "tcp://127.0.0.1:1", max_message_nbytes=1000, high_water_mark=10)
    sockets.close()


@in_event_loop
async def test_a_connection_without_room_for_its_watch_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(socket: zmq.asyncio.Socket, events: int) -> None:
        opened.append(socket)
        raise zmq.ZMQError(errno.EMFILE)

    opened: list[zmq.asyncio.Socket] = []
    monkeypatch.setattr(zmq.asyncio.Socket, "get_monitor_socket", no_room)
    sockets = Sockets(KEYS)
    with pytest.raises(Shortage, match="the watch of a connection cannot be opened now"):
        Connection(sockets, "tcp://127.0.0.1:1", max_message_nbytes=1000, high_water_mark=10)
    assert [socket.closed for socket in opened] == [True]
    sockets.close()


@in_event_loop
async def test_data_and_control_have_io_threads_of_their_own() -> None:
    sockets = Sockets(KEYS)
    assert sockets.context.get(zmq.IO_THREADS) == 1 + wire_sockets.DATA_THREADS
    assert sockets.context.get(zmq.MAX_SOCKETS) == wire_sockets.MAX_SOCKETS
    opened = [
        sockets.open(zmq.DEALER, max_message_nbytes=1, high_water_mark=1, carries_data=carries)
        for carries in (False, True)
    ]
    control, data = (socket.getsockopt(zmq.AFFINITY) for socket in opened)
    assert control == 1
    assert data
    assert not control & data
    for socket in opened:
        socket.close()
    sockets.close()


def test_the_pause_doubles_while_this_process_is_short_and_is_short_again_afterwards() -> None:
    link = PeerLink.__new__(PeerLink)
    link._pause_s = peer_link.RECONNECT_S
    pauses = [link._next_pause(Shortage("no descriptors")) for _ in range(6)]
    assert pauses == [peer_link.RECONNECT_S * factor for factor in (1, 2, 4, 8, 8, 8)]
    assert link._next_pause(PeerLost("gone")) == peer_link.RECONNECT_S
