"""Connections of strangers, at any door: bytes that mean nothing, halves of greetings, silence."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from support.abuse.pair import Door

CONNECT_TIMEOUT_S = 0.5
SEND_TIMEOUT_S = 0.2
REST_S = 0.002  # some hundred connections a second: the strangers are on the same two cores as the honest streams
ZMTP = bytes.fromhex("ff00000000000000017f") + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
CURVE = bytes.fromhex("ff00000000000000017f") + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
GREETINGS = (
    ZMTP,
    CURVE,
    CURVE + b"\x04\xc8\x05HELLO" + bytes(194),  # a CURVE HELLO of zeros
    ZMTP + b"\x06" + struct.pack(">Q", 2**63 - 1),  # a frame that says it is this long
    b"DSM1" + bytes(16) + b"\xff" + b"x" * 255,  # a token of zeros, for a peer of the longest name
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # the hello of TLS
    b"\0" * 4096,
    b"\xff" * 4096,
)


@dataclass
class Knocks:
    """What was tried. `num_unheard`: connections that the door did not take, for a full backlog or none at all."""

    num_made: int = 0
    num_unheard: int = 0

    def __str__(self) -> str:
        return f"{self.num_made} connections, {self.num_unheard} not taken"


def knock(doors: Sequence[Door], rng: random.Random, *, num_rounds: int, num_held: int, seconds: float) -> Knocks:
    """At each door in turn: random bytes, whole and half greetings, with and without leaving. `num_held` connections
    per door stay and say nothing more; past that the oldest goes."""
    knocks, until = Knocks(), time.monotonic() + seconds
    held: dict[Door, list[socket.socket]] = {door: [] for door in doors}
    with contextlib.ExitStack() as stack:
        for door in doors:
            stack.callback(lambda kept=held[door]: [sock.close() for sock in kept])
        for _ in range(num_rounds):
            for door in doors:
                if time.monotonic() > until:
                    return knocks
                sock = _knock(door, saying(rng), knocks)
                if sock is None:
                    continue
                held[door].append(sock)
                if len(held[door]) > num_held:
                    held[door].pop(0).close()
    return knocks


def saying(rng: random.Random) -> bytes:
    """A greeting, some of one, one with a flipped byte, noise, or nothing."""
    greeting = rng.choice(GREETINGS)
    match rng.randrange(6):
        case 0:
            return greeting
        case 1:
            return greeting[: rng.randrange(len(greeting))]
        case 2:
            at = rng.randrange(len(greeting))
            return greeting[:at] + bytes([greeting[at] ^ 1 << rng.randrange(8)]) + greeting[at + 1 :]
        case 3:
            return greeting + rng.randbytes(rng.randrange(3000))
        case 4:
            return rng.randbytes(rng.randrange(1, 3000))
        case _:
            return b""


def _knock(door: Door, data: bytes, knocks: Knocks) -> socket.socket | None:
    try:
        sock = door.connect(CONNECT_TIMEOUT_S)
    except OSError:
        knocks.num_unheard += 1
        return None
    knocks.num_made += 1
    time.sleep(REST_S)
    with contextlib.suppress(OSError):  # it hung up in the middle
        sock.settimeout(SEND_TIMEOUT_S)
        sock.sendall(data)
    return sock
