"""The client's end of one ZeroMQ connection, from connect to loss. A connection that was lost stays lost."""

from __future__ import annotations

import asyncio
import struct
from typing import Final

import zmq
import zmq.asyncio

from disagg.transceiver.wire.errors import PeerLost
from disagg.transceiver.wire.sockets import Sockets, shortage
from disagg.transceiver.wire.turns import TaskTurn

WATCHED_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class FrameReader:
    """Receives from one socket so that a cancelled `receive` loses no message: it stays for the next call."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._turn = TaskTurn()
        self._pending: asyncio.Future[list[zmq.Frame]] | None = None

    async def receive(self) -> list[zmq.Frame]:
        """The next message's frames, in libzmq's own memory. One caller at a time. Raises what `fail` was given."""
        if self._pending is None and not self._turn.is_over and (frames := self._take_what_is_there()) is not None:
            return frames
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._socket.recv_multipart(copy=False))
        if not self._pending.done() or self._turn.is_over:  # what has come already costs no turn, for a while
            await asyncio.sleep(0)
            # Unlike a plain await, leaves the future alone when this task is cancelled.
            await asyncio.wait({self._pending})
            self._turn.begin()
        pending, self._pending = self._pending, None
        return pending.result()

    def _take_what_is_there(self) -> list[zmq.Frame] | None:
        """Without asking for an event: a third of what it costs to wait for a message that has come already."""
        taken = asyncio.ensure_future(self._socket.recv_multipart(copy=False, flags=zmq.DONTWAIT))
        fault = taken.exception()  # DONTWAIT: the future is done when it is made
        if fault is None:
            return taken.result()
        if not isinstance(fault, zmq.Again):
            raise fault
        return None

    def fail(self, error: Exception) -> None:
        """End a waiting `receive` with `error`; messages that already arrived are not touched."""
        if self._pending is not None and not self._pending.done():
            self._pending.set_exception(error)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.cancel()


class Connection:
    """A DEALER with one connection, and a watch on it that notices EOF at once.

    libzmq would reconnect by itself, and deliver to a new process on the same port what was meant for the dead one.
    So the first disconnect after a handshake is final: the owner connects anew, under a new routing id.
    """

    def __init__(
        self,
        sockets: Sockets,
        endpoint: str,
        *,
        max_message_nbytes: int,
        high_water_mark: int,
        carries_data: bool = False,
    ) -> None:
        """Begin to connect; a loop must run. Raises `EndpointRefused`, or `Shortage` and then leaves nothing open."""
        self.endpoint = endpoint
        self._socket = sockets.open(
            zmq.DEALER,
            max_message_nbytes=max_message_nbytes,
            high_water_mark=high_water_mark,
            carries_data=carries_data,
        )
        try:
            self._monitor = self._socket.get_monitor_socket(WATCHED_EVENTS)
        except zmq.ZMQError as exc:
            self._socket.close()
            raise shortage("the watch of a connection", exc) from exc
        self._receiver = FrameReader(self._socket)
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()
        try:
            sockets.connect(self._socket, endpoint)
        except BaseException:
            self._close_sockets()
            raise
        self._watching = asyncio.create_task(self._watch(), name=f"watch {endpoint}")

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    async def ready(self) -> None:
        """Wait for the first handshake (the caller owns the deadline)."""
        await self._ready.wait()

    async def lost(self) -> None:
        """Wait until the peer is gone."""
        await self._lost.wait()

    def send(self, frames: list[bytes]) -> None:
        """Queue one message. Raises `PeerLost` when no peer is connected or the queue is full; never blocks."""
        if not self.is_lost:
            sent = asyncio.ensure_future(self._socket.send_multipart(frames, flags=zmq.DONTWAIT))
            error = sent.exception()  # DONTWAIT: the future is done when it is made
            if error is None:
                return
            if not isinstance(error, zmq.ZMQError):
                raise error
        raise self._gone()

    async def receive(self) -> list[zmq.Frame]:
        """The next message's frames. Cancel-safe; one caller at a time. Raises `PeerLost`."""
        if self.is_lost:
            raise self._gone()
        return await self._receiver.receive()

    def linger(self, milliseconds: int) -> None:
        """Let messages that are queued be sent for so long after `close`."""
        self._socket.setsockopt(zmq.LINGER, milliseconds)

    async def close(self) -> None:
        """Close the connection at once; nothing lingers. Safe to repeat."""
        if self._socket.closed:
            return
        self._lost.set()
        self._receiver.fail(self._gone())
        self._watching.cancel()
        await asyncio.wait({self._watching})
        self._close_sockets()

    def _gone(self) -> PeerLost:
        state = "is gone" if self._ready.is_set() else "does not answer yet"
        return PeerLost(f"the peer at {self.endpoint} {state}")

    async def _watch(self) -> None:
        while True:
            frames = await self._monitor.recv_multipart()
            event, _ = struct.unpack("=hi", frames[0])  # libzmq's monitor format: event, value
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._ready.set()
            elif self._ready.is_set():
                break
        self._lost.set()
        self._receiver.fail(self._gone())
        self._socket.disconnect(self.endpoint)

    def _close_sockets(self) -> None:
        self._receiver.close()
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
