"""A peer that holds the cluster's secret and says what no worker of ours would, as bytes on its own CURVE sockets."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

import zmq
from support.abuse.mutants import packed_form
from support.abuse.pair import KEYS, Pair
from support.links.sample_messages import SAMPLES

from disagg.transceiver.wire.codec import decode
from disagg.transceiver.wire.messages.peer import Header, Hello, Welcome
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Geometry, Identity
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.schema import Record

SEND_TIMEOUT_MS = 2000
ANSWER_TIMEOUT_MS = 5000
NOWHERE = "tcp://127.0.0.1:1"  # a port at which nothing listens
BREATH_EVERY = 20
BREATH_S = 0.02  # a peer's messages compete for the same two cores as the honest streams


@contextlib.contextmanager
def speaking_to(endpoint: str, *, knows_secret: bool = True) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER at a control endpoint. Without the secret it owns a key pair of its own."""
    public, secret = (KEYS.curve_public, KEYS.curve_secret) if knows_secret else zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, SEND_TIMEOUT_MS)
        socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        socket.setsockopt(zmq.RCVTIMEO, ANSWER_TIMEOUT_MS)
        socket.setsockopt(zmq.CURVE_SERVERKEY, KEYS.curve_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(15))
        socket.connect(endpoint)
        yield socket


def say(socket: zmq.Socket[bytes], words: Iterable[bytes]) -> int:
    """How many of them were sent: a connection that its peer closed takes no more."""
    count = 0
    for data in words:
        with contextlib.suppress(zmq.Again):
            socket.send(data)
            count += 1
        if count % BREATH_EVERY == 0:
            time.sleep(BREATH_S)
        while socket.poll(0):  # what is answered is read, or the answers would be what fills the peer's queues
            socket.recv_multipart(zmq.NOBLOCK)
    return count


def next_of(socket: zmq.Socket[bytes], kind: type) -> Any:
    """The next message of this kind; others are read past. Raises zmq.Again when none comes."""
    while True:
        message = decode(socket.recv_multipart()[-1])
        if isinstance(message, kind):
            return message


def worker(pair: Pair, worker_id: str) -> dict[str, Any]:
    return next(known for known in pair.api.workers() if known["id"] == worker_id)


def identity_of(pair: Pair) -> Identity:
    identity: Identity = Record(Identity).read(worker(pair, "prefill-0")["identity"], "identity")
    return identity


def geometry_of(pair: Pair) -> Geometry:
    geometry: Geometry = Record(Geometry).read(worker(pair, "prefill-0")["geometry"], "geometry")
    return geometry


def registration(pair: Pair, worker_id: str, endpoint: str = NOWHERE) -> Register:
    """One that the router has no reason to refuse, as a prefill worker of this cluster."""
    slots = tuple(pool["slots"] for pool in worker(pair, "prefill-0")["blocks"])
    facts = (identity_of(pair), geometry_of(pair), ("tcp",), endpoint, 1, "nowhere", "cpu", slots)
    return Register(draw_id(), worker_id, "prefill", *facts)


def registration_of(pair: Pair, worker_id: str) -> Register:
    """What an honest worker registered with, as far as `/workers` tells it: enough to say it again."""
    known = worker(pair, worker_id)
    form = {
        name: known[name] for name in ("incarnation", "role", "identity", "geometry", "planes", "pid", "host", "device")
    }
    form |= {"worker_id": worker_id, "peer_endpoint": known["endpoint"], "eos_token_ids": []}
    form["num_slots"] = [pool["slots"] for pool in known["blocks"]]
    register: Register = Record(Register).read(form, "register")
    return register


def hello(pair: Pair, incarnation: str) -> Hello:
    return Hello(incarnation, "insider", identity_of(pair), geometry_of(pair), ("tcp", "zmq"))


def forms(incarnation: str, destination: str) -> Iterator[tuple[type, dict[str, Any]]]:
    """One message of every kind, in this peer's own name and to the peer that it speaks to."""
    header = packed_form(Header(incarnation, destination, draw_id(), 1, 1))
    for sample in SAMPLES:
        form = packed_form(sample)
        if "header" in form:
            form["header"] = header
        if "incarnation" in form and not isinstance(sample, Welcome):
            form["incarnation"] = incarnation
        yield type(sample), form
