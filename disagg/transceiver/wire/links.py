"""Control links: typed messages between processes, over ZeroMQ on tcp.

A server (router, prefill worker) answers many clients, each known by the routing id of its connection. A client has one
connection; when it is lost the owner makes a new client and says HELLO or REGISTER again. Delivery is at most once
here: repeating is the protocol's business. A server learns that a client is gone by its next send, at most one
heartbeat later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final

import zmq

from disagg.transceiver.wire.codec import Message, decode, encode
from disagg.transceiver.wire.connection import Connection, FrameReader
from disagg.transceiver.wire.errors import PeerLost, ProtocolDiffers, RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.sizes import MAX_MESSAGE_NBYTES
from disagg.transceiver.wire.sockets import Sockets, reason

log = logging.getLogger(__name__)

HIGH_WATER_MARK: Final = 16_384
"""Messages queued per peer and direction before it counts as lost. Credit bounds a worker's tokens; what else
is said is a few messages per attempt and some leases a second, so only a peer that reads nothing lets so many wait."""


FAREWELL_MS: Final = 200
"""How long a closing client tries to deliver its last word: on a live connection it takes a fraction of one."""


PROTOCOL_FIELD: Final = "protocol"
"""Names the versions in a refusal of another major, where no record was read that could be compared."""


class _Inlet:
    """Decodes frames and counts what is not a message; a peer cannot end the loop that reads."""

    def __init__(self) -> None:
        self.num_malformed = 0

    def read(self, frame: zmq.Frame) -> Any | None:
        """The message, or None. Raises `ProtocolDiffers`: such a peer is told, or can be given up."""
        try:
            return decode(frame.buffer)
        except ProtocolDiffers as exc:
            self.refuse(str(exc))
            raise
        except RemoteProtocolError as exc:
            self.refuse(str(exc))
            return None

    def refuse(self, fault: str) -> None:
        self.num_malformed += 1
        if self.num_malformed & (self.num_malformed - 1) == 0:  # log 1, 2, 4, 8...: a flood cannot fill the disk
            log.warning("dropped a malformed control message (%d so far): %s", self.num_malformed, fault)


class ControlServer:
    """Listens for peers. `recv` and `close` belong to one task; `send` to any task of the loop."""

    def __init__(self, endpoint: str, keys: ClusterKeys, sockets: Sockets | None = None) -> None:
        self._owned = Sockets(keys) if sockets is None else None
        sockets = sockets or self._owned
        assert sockets is not None
        self.sockets = sockets
        self._socket = sockets.open(zmq.ROUTER, max_message_nbytes=MAX_MESSAGE_NBYTES, high_water_mark=HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unroutable message is an error, never dropped silently
        self._receiver = FrameReader(self._socket)
        self._inlet = _Inlet()
        try:
            self.endpoint = sockets.bind(self._socket, endpoint)
        except BaseException:
            self._release()
            raise

    @classmethod
    def bind(cls, endpoint: str, keys: ClusterKeys, sockets: Sockets | None = None) -> ControlServer:
        """Listen at tcp://HOST:PORT; port 0 takes a free one, `.endpoint` names it. Raises `EndpointRefused`.

        `sockets` is shared with the caller, which closes it later; without one the server owns its own.
        """
        return cls(endpoint, keys, sockets)

    @property
    def num_malformed(self) -> int:
        """Messages dropped because they were none."""
        return self._inlet.num_malformed

    async def recv(self) -> tuple[bytes, Any]:
        """The next (routing id, message). Cancel-safe. Malformed messages are counted and dropped here.

        A peer on another major version is sent REFUSED, which every version can read, naming both.
        """
        while True:
            frames = await self._receiver.receive()
            if len(frames) != 2:
                self._inlet.refuse(f"{len(frames) - 1} frames, expected 1")
                continue
            peer, data = frames
            try:
                message = self._inlet.read(data)
            except ProtocolDiffers as other:
                with contextlib.suppress(PeerLost):
                    await self.send(peer.bytes, Refused(PROTOCOL_FIELD, other.ours, other.theirs))
                continue
            if message is not None:
                return peer.bytes, message

    async def send(self, peer: bytes, message: Message | bytes) -> None:
        """Queue `message` for `peer`, or its bytes where the same goes to many.

        Raises `PeerLost` when the peer is not connected or reads nothing; never waits.
        """
        self.send_now(peer, message)

    def send_now(self, peer: bytes, message: Message | bytes) -> None:
        """As `send`, which waits for nothing."""
        data = message if isinstance(message, bytes) else encode(message)
        sent = asyncio.ensure_future(self._socket.send_multipart([peer, data], flags=zmq.DONTWAIT))
        fault = sent.exception()  # DONTWAIT: the future is done when it is made
        if isinstance(fault, zmq.ZMQError):
            raise PeerLost(f"peer {peer.hex()} is gone: {reason(fault)}") from fault
        if fault is not None:
            raise fault

    async def close(self) -> None:
        """Stop listening and drop every connection; a task waiting in `recv` is cancelled. Safe to repeat."""
        self._release()

    def _release(self) -> None:
        self._receiver.close()
        self._socket.close()
        if self._owned is not None:
            self._owned.close()


class ControlClient:
    """One connection to a server. `recv` belongs to one task; `send` and `lost` to any task of the loop."""

    def __init__(self, endpoint: str, keys: ClusterKeys, sockets: Sockets | None = None) -> None:
        self._owned = Sockets(keys) if sockets is None else None
        sockets = sockets or self._owned
        assert sockets is not None
        self._inlet = _Inlet()
        try:
            self._connection = Connection(
                sockets, endpoint, max_message_nbytes=MAX_MESSAGE_NBYTES, high_water_mark=HIGH_WATER_MARK
            )
        except BaseException:
            if self._owned is not None:
                self._owned.close()
            raise

    @classmethod
    async def connect(cls, endpoint: str, keys: ClusterKeys, sockets: Sockets | None = None) -> ControlClient:
        """Begin to connect, without waiting: see `ready`. `sockets` as in `bind`.

        Raises `EndpointRefused`, or `Shortage` when this process has no descriptor for it.
        """
        return cls(endpoint, keys, sockets)

    @property
    def num_malformed(self) -> int:
        """Messages dropped because they were none."""
        return self._inlet.num_malformed

    async def ready(self) -> None:
        """Wait for the connection's handshake; the caller owns the deadline. Until then `send` raises `PeerLost`."""
        await self._connection.ready()

    async def lost(self) -> None:
        """Wait until an established connection ended (EOF, RST, silence of the network). Final for this client."""
        await self._connection.lost()

    async def recv(self) -> Any:
        """The next message. Cancel-safe. Raises `PeerLost` once the connection is lost, and `ProtocolDiffers`."""
        while True:
            frames = await self._connection.receive()
            if len(frames) != 1:
                self._inlet.refuse(f"{len(frames)} frames, expected 1")
                continue
            message = self._inlet.read(frames[0])
            if message is not None:
                return message

    async def send(self, message: Message) -> None:
        """Queue `message`. Raises `PeerLost` when not connected or the peer reads nothing; never waits."""
        self._connection.send([encode(message)])

    async def leave(self, message: Message) -> None:
        """Say a last word and close; it has `FAREWELL_MS` to leave this process. A peer that is gone is no error."""
        with contextlib.suppress(PeerLost):
            self._connection.send([encode(message)])
        self._connection.linger(FAREWELL_MS)
        await self.close()

    async def close(self) -> None:
        """Close at once. A task waiting in `recv` gets `PeerLost`. Safe to repeat."""
        await self._connection.close()
        if self._owned is not None:
            self._owned.close()
