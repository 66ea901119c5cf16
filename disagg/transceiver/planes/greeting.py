"""The first bytes of a reader on a data connection, before it is served anything: magic, token, incarnation."""

from __future__ import annotations

import struct
from typing import Final

from disagg.transceiver.planes.tokens import TOKEN_NBYTES

HANDSHAKE_S: Final = 5.0
"""Both ends answer from their event loops within a round trip: seconds mean that a process is stuck."""

GREETING_S: Final = 0.5
"""A reader says its greeting with its first packet: a round trip and a lost packet fit in, a silent stranger does not
keep a place for longer. One that was stopped for as long knocks again."""

MAX_SILENT: Final = 128
"""Connections to one plane that have not shown a token yet. They are the only descriptors that strangers can take."""

MAGIC: Final = b"DSM1"
GREETING: Final = struct.Struct(f"<4s{TOKEN_NBYTES}sB")


def greeting(me: str, token: bytes) -> bytes:
    name = me.encode()
    return GREETING.pack(MAGIC, token, len(name)) + name


def parse_greeting(data: bytes) -> tuple[str, bytes] | None:
    """(incarnation, token), or None while bytes are missing. Raises `ValueError` for anything else."""
    if len(data) < GREETING.size:
        return None
    magic, token, length = GREETING.unpack_from(data)
    if magic != MAGIC or len(data) > GREETING.size + length:
        raise ValueError("not a greeting")
    if len(data) < GREETING.size + length:
        return None
    return data[GREETING.size :].decode(), token
