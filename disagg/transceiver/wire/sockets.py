"""ZeroMQ sockets as this project opens them: one context per process, the same options and lock on every door.

Unless the keys are insecure every connection is CURVE: the server's key pair is the cluster's, a client owns the same
pair, and a ZAP handler admits exactly that public key. A process without the secret is cut off in the handshake, before
one frame reaches this process. Insecure sockets stay on loopback.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import os
import secrets
import threading
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.utils import z85

from disagg.transceiver.wire.errors import EndpointRefused, Shortage
from disagg.transceiver.wire.keys import ClusterKeys

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_MS: Final = 1000
"""ZMTP PING by libzmq's own thread. It finds a peer whose machine or network died without a FIN; processes that end are
found by EOF and stuck ones by the protocol's heartbeats, so this one needs no haste."""

HEARTBEAT_TIMEOUT_MS: Final = 3000
"""No PONG for this long closes the connection: the same 3 s after which the protocol calls a silent peer lost."""

CONNECT_TIMEOUT_MS: Final = 3000
"""A SYN without an answer: the kernel would try for two minutes, during which a restarted peer is not found."""

HANDSHAKE_TIMEOUT_MS: Final = 10_000
"""A handshake ends in the gate's Python thread, which may wait for the GIL while a model loads: longer than `lost`."""

RECONNECT_INTERVAL_MS: Final = 100
"""Until the first handshake libzmq retries this often: a peer that starts late is found in well under a second."""

FRAME_OVERHEAD_NBYTES: Final = 1024
"""What CURVE's box, flags and our headers may add to a frame on top of the payload a limit speaks of."""

MAX_SOCKETS: Final = 12_288
"""Of one context. A decode worker has six with each peer, a connection and the two ends of its watch for control and
as many for a data plane: 2,048 peers, twice what one router serves. Each costs a pointer until it is opened; what
really bounds them is the limit of open files. libzmq's own bound is 1,023, so 170 peers."""

DATA_THREADS: Final = min(4, max(1, (os.cpu_count() or 1) // 2))
"""I/O threads that encrypt and copy payload, beside the one of control connections: as many as half of the cores, the
others compute; four move more than a 10 Gbit/s network does."""

_CONTROL_AFFINITY: Final = 1
_DATA_AFFINITY: Final = ((1 << DATA_THREADS) - 1) << 1
"""Bit n: I/O thread n. A heartbeat never waits behind a frame of 8 MiB that is being encrypted."""

SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})
"""What the kernel says when it has no descriptor, memory or thread to give."""

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
"""Fixed by RFC 27: libzmq asks here about each handshake of its context."""

ZAP_NUM_FRAMES: Final = 7
"""version, request id, domain, address, routing id, mechanism, and for CURVE the client's public key."""


STRANGER: Final = "the client does not own this cluster's key"

AnySocket = zmq.asyncio.Socket | zmq.Socket[bytes]
"""Of an event loop, or of a thread."""


def new_routing_id() -> bytes:
    """16 random bytes for one connection. The first is not zero: ids that start with zero are libzmq's own."""
    return bytes([1 + secrets.randbelow(255)]) + secrets.token_bytes(15)


def bracketed(host: str) -> str:
    """`host` as it stands in an endpoint: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_endpoint(endpoint: str, keys: ClusterKeys) -> None:
    """Raise `EndpointRefused` unless `endpoint` is tcp://HOST:PORT, and on loopback when the keys are insecure."""
    parts = urlsplit(endpoint)
    try:
        port = parts.port
    except ValueError:  # not a number, or above 65535
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None or parts.path:
        raise EndpointRefused(f"{endpoint!r} is no endpoint: expected tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    if keys.insecure and not _is_loopback(parts.hostname):
        raise EndpointRefused(
            f"--insecure serves loopback only, and {endpoint} is not: use tcp://127.0.0.1:{port}, or give a secret"
        )


def reason(error: zmq.ZMQError) -> str:
    """What libzmq says of `error`, without pyzmq's copy of the address."""
    return zmq.strerror(error.errno or 0)


def shortage(what: str, error: zmq.ZMQError | OSError) -> Shortage:
    """What to raise when `error` says that there is no room for `what`."""
    said = reason(error) if isinstance(error, zmq.ZMQError) else error.strerror or str(error)
    advice = "; raise the limit of open files (`ulimit -n`)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return Shortage(f"{what} cannot be opened now: {said}{advice}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: where it points may change after the check
        return False


def _limit(socket: AnySocket, max_message_nbytes: int, high_water_mark: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)  # what a closed link still holds is stale: the peer asks again, or is gone
    socket.setsockopt(zmq.IMMEDIATE, 1)  # queue for a live connection only, never for one that may come
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_nbytes + FRAME_OVERHEAD_NBYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)


class Sockets:
    """The ZeroMQ context of a process with its gate, which its servers, clients and planes share.

    Close every socket before `close`, which ends the context's threads. Not for use after a fork.
    """

    def __init__(self, keys: ClusterKeys) -> None:
        """Raises `Shortage`."""
        self.keys = keys
        self.context = zmq.asyncio.Context(io_threads=1 + DATA_THREADS)
        self.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        try:
            self._gate = None if keys.insecure else KeyGate(self.context, (keys.curve_public,))
        except zmq.ZMQError as exc:
            self.context.destroy(linger=0)
            raise shortage("a ZeroMQ context", exc) from exc

    def open(
        self, kind: int, *, max_message_nbytes: int, high_water_mark: int, carries_data: bool = False
    ) -> zmq.asyncio.Socket:
        """An unbound socket of type `kind`. The limits bound what libzmq queues, per peer and direction.

        Raises `Shortage` when the process has no descriptor left for it.
        """
        try:
            socket: zmq.asyncio.Socket = self.context.socket(kind)
        except zmq.ZMQError as exc:
            raise shortage("a connection", exc) from exc
        socket.setsockopt(zmq.AFFINITY, _DATA_AFFINITY if carries_data else _CONTROL_AFFINITY)
        _limit(socket, max_message_nbytes, high_water_mark)
        return socket

    def open_for_thread(self, kind: int, *, max_message_nbytes: int, high_water_mark: int) -> zmq.Socket[bytes]:
        """As `open`, for a thread that is no event loop's: it alone uses the socket, and closes it before `close`.

        Raises `Shortage`.
        """
        try:
            socket: zmq.Socket[bytes] = zmq.Context.shadow(self.context.underlying).socket(kind)
        except zmq.ZMQError as exc:
            raise shortage("a connection", exc) from exc
        socket.setsockopt(zmq.AFFINITY, _CONTROL_AFFINITY)
        _limit(socket, max_message_nbytes, high_water_mark)
        return socket

    def bind(self, socket: AnySocket, endpoint: str) -> str:
        """Listen at `endpoint` (port 0 = any free one) and return the actual one. Raises `EndpointRefused`."""
        check_endpoint(endpoint, self.keys)
        if not self.keys.insecure:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.curve_secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, b"disagg")
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as exc:
            raise EndpointRefused(f"cannot listen at {endpoint}: {reason(exc)}; choose another port or host") from exc
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def connect(self, socket: AnySocket, endpoint: str) -> None:
        """Begin to connect under a fresh routing id; retries until the peer listens. Raises `EndpointRefused`."""
        check_endpoint(endpoint, self.keys)
        if not self.keys.insecure:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self.keys.curve_public)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.curve_public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.curve_secret)
        socket.setsockopt(zmq.ROUTING_ID, new_routing_id())
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as exc:
            raise EndpointRefused(f"cannot connect to {endpoint}: {reason(exc)}") from exc

    def close(self) -> None:
        """End the context and its gate. Safe to repeat; takes milliseconds, since nothing lingers."""
        self.context.destroy(linger=0)
        if self._gate is not None:
            self._gate.join()


class KeyGate:
    """ZAP handler: admits CURVE clients that own an allowed key. A thread, so that no busy loop delays a handshake.

    It ends when its context does: the blocked `recv` then raises `ContextTerminated`.
    """

    def __init__(self, context: zmq.Context[Any], allowed: Iterable[bytes], refusal: str = STRANGER) -> None:
        """`allowed`: public keys in Z85. `refusal`: what the log says of a client that has none of them."""
        self._allowed, self._refusal = tuple(allowed), refusal
        # A shadow context gives plain blocking sockets of the same libzmq context. Bound here, before any server is:
        # a handshake that finds no handler would be admitted unasked.
        self._socket: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ENDPOINT)  # in this process: no descriptor that `socket` did not have
        self._thread = threading.Thread(target=self._run, name="zap-gate", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        except zmq.ContextTerminated:
            self._socket.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        request_id = request[1] if len(request) > 1 else b""
        if self._admits(request):
            return [b"1.0", request_id, b"200", b"OK", b"cluster", b""]
        log.warning("refused a connection: %s", self._refusal)
        return [b"1.0", request_id, b"400", b"unknown key", b"", b""]

    def _admits(self, request: list[bytes]) -> bool:
        if len(request) != ZAP_NUM_FRAMES or request[5] != b"CURVE" or len(request[6]) != 32:
            return False
        key = z85.encode(request[6])
        return any(hmac.compare_digest(key, allowed) for allowed in self._allowed)
