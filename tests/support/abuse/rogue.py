"""A prefill worker that registers, is connected to, and answers with what no prefill worker of ours would."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import zmq
from support.abuse.insider import registration, speaking_to
from support.abuse.pair import KEYS, Pair

from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.messages.peer import Hello
from disagg.transceiver.wire.messages.router import Lease, Registered
from disagg.transceiver.wire.timing import HEARTBEAT_S

POLL_MS = 100
CONTACT_TIMEOUT_S = 10.0
BREATH_S = 0.005


@dataclass
class Rogue:
    """`hello`: what the decode worker said; `route`: the name of its connection."""

    incarnation: str
    socket: zmq.Socket[bytes]
    hello: Hello | None = None
    route: bytes = b""

    def wait_for_hello(self) -> Hello:
        deadline = time.monotonic() + CONTACT_TIMEOUT_S
        while self.hello is None:
            assert time.monotonic() < deadline, "the decode worker does not connect to the rogue"
            self.listen()
        return self.hello

    def listen(self) -> None:
        """Take in what the decode worker says. It may have hung up and come again under another name."""
        while self.socket.poll(POLL_MS if self.hello is None else 0):
            self.route, data = self.socket.recv_multipart()
            message = decode(data)
            if isinstance(message, Hello):
                self.hello = message

    def say_all(self, words: Sequence[bytes]) -> None:
        for data in words:
            self.listen()
            with contextlib.suppress(zmq.ZMQError):  # it hung up, or reads nothing
                self.socket.send_multipart([self.route, data], flags=zmq.NOBLOCK)
            time.sleep(BREATH_S)


@contextlib.contextmanager
def rogue(pair: Pair, worker_id: str) -> Iterator[Rogue]:
    """It listens, is registered, and renews its lease while the block runs."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, KEYS.curve_secret)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        register = registration(pair, worker_id, f"tcp://127.0.0.1:{port}")
        stop = threading.Event()
        leases = threading.Thread(
            target=_keep_registered, args=(pair.control, encode(register), register.incarnation, stop)
        )
        leases.start()
        try:
            yield Rogue(register.incarnation, socket)
        finally:
            stop.set()
            leases.join()


def _keep_registered(control: str, register: bytes, incarnation: str, stop: threading.Event) -> None:
    with speaking_to(control) as router:
        router.send(register)
        known = ""
        while not stop.wait(HEARTBEAT_S):
            while router.poll(0):
                message = decode(router.recv_multipart()[-1])
                if isinstance(message, Registered):
                    known = message.router_incarnation
            if known:
                router.send(encode(Lease(incarnation, known)))
