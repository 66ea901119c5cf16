"""The sockets at which cached blocks are published, and asked for again after a gap. Of the index process alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import zmq

from disagg.transceiver.wire.sockets import KeyGate

HIGH_WATER_MARK: Final = 256
"""Messages that wait for one subscriber or one peer that replays: two minutes of one worker's. What is more is lost to
that one, which sees the gap."""

KEPT_NBYTES: Final = 64 << 20
KEPT_BATCHES: Final = 10_000
"""For replay: an hour of one quiet worker, half a minute of 62,000 stored and as many dropped blocks a second."""

MAX_REPLAYED: Final = HIGH_WATER_MARK - 1
"""Batches that one request is answered with, and the end after them: what one peer may have waiting. It asks again from
the last it got."""

END_SEQUENCE: Final = (-1).to_bytes(8, "big", signed=True)

DOMAIN: Final = b"disagg-kv-events"


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """`endpoint`, `replay_endpoint`: tcp://HOST:PORT; port 0 takes a free one. `hash_key`: of the published hashes.

    `curve_secret`: this end's key in Z85, b"" = no encryption; `allowed`: the public keys of clients, in Z85.
    `model`: its name in topics.
    """

    endpoint: str
    replay_endpoint: str
    hash_key: bytes = field(repr=False)
    model: str
    curve_secret: bytes = field(default=b"", repr=False)
    allowed: tuple[bytes, ...] = ()


class KvEventsPublisher:
    """Numbers batches, sends them to subscribers, keeps the last for those that missed some."""

    def __init__(self, options: PublishOptions) -> None:
        """Raises `zmq.ZMQError` when an endpoint cannot be listened at."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        unlisted = "no key of `--kv-events-keys`"
        self._gate = KeyGate(self._context, options.allowed, unlisted) if options.curve_secret else None
        self._subscribers = self._listen(zmq.PUB, options.endpoint, options)
        self.replays = self._listen(zmq.ROUTER, options.replay_endpoint, options)
        """Readable when a peer asks for a replay."""
        self.endpoints = tuple(
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self._subscribers, self.replays)
        )
        self._kept: deque[tuple[bytes, bytes, bytes]] = deque()
        self._kept_nbytes = self._sequence = 0

    def publish(self, topic: bytes, payload: bytes) -> None:
        """Send a batch. Never waits: a subscriber that reads nothing loses it."""
        frames = topic, self._sequence.to_bytes(8, "big"), payload
        self._subscribers.send_multipart(frames)
        self._sequence += 1
        self._kept.append(frames)
        self._kept_nbytes += len(payload)
        while len(self._kept) > KEPT_BATCHES or self._kept_nbytes > KEPT_NBYTES:
            self._kept_nbytes -= len(self._kept.popleft()[2])

    def answer_replay(self) -> None:
        """Answer [peer, b"", first sequence] with [peer, b"", topic, sequence, payload] for each batch, and an end."""
        frames = self.replays.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        peer, first = frames[0], int.from_bytes(frames[2], "big")
        oldest = self._sequence - len(self._kept)
        start = max(0, first - oldest)
        for place in range(start, min(len(self._kept), start + MAX_REPLAYED)):
            self._reply(peer, *self._kept[place])
        self._reply(peer, b"", END_SEQUENCE, b"")

    def close(self) -> None:
        self._subscribers.close(linger=0)
        self.replays.close(linger=0)
        self._context.term()
        if self._gate is not None:
            self._gate.join()

    def _reply(self, peer: bytes, *frames: bytes) -> None:
        self.replays.send_multipart((peer, b"", *frames))  # a ROUTER drops what its peer has no room for

    def _listen(self, kind: int, endpoint: str, options: PublishOptions) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, 1024)  # what peers say: subscriptions, sequence numbers
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if options.curve_secret:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, options.curve_secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.bind(endpoint)
        return socket
