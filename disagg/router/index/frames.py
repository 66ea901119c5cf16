"""What the router and its index process say to each other over two pipes: frames of a kind, a length and bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import msgpack

from disagg.transceiver.wire.messages.blocks import BlockEvents

HEAD: Final = struct.Struct("=cI")

PUBLISH: Final = b"P"  # the fields of PublishOptions; answered with both endpoints, or with REFUSED
REFUSED: Final = b"R"  # why
SETTINGS: Final = b"S"  # hash key, model fingerprint, (window, sinks) of each group
ADDED: Final = b"A"  # incarnation, block size, worker id, medium
GONE: Final = b"G"  # incarnation
EVENTS: Final = b"E"  # the fields of BLOCK_EVENTS, in order
QUESTION: Final = b"Q"  # number, salt, most holders, prompt as int32
HOLDERS: Final = b"H"  # number, (incarnation, tokens) of each
MISSED: Final = b"M"  # incarnation: a message of it was missed
FIGURES: Final = b"F"  # asked for with nothing; blocks, CPU seconds, resident bytes

_FIELDS: Final = tuple(field.name for field in fields(BlockEvents))


def frame(kind: bytes, *values: Any) -> bytes:
    payload: bytes = msgpack.packb(values)
    return HEAD.pack(kind, len(payload)) + payload


def events_frame(events: BlockEvents) -> bytes:
    return frame(EVENTS, *(getattr(events, name) for name in _FIELDS))


def values_of(payload: bytes) -> tuple[Any, ...]:
    values: tuple[Any, ...] = msgpack.unpackb(payload, use_list=False)
    return values


class FrameBuffer:
    """Bytes as they come, frames as they are whole."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """(kind, payload) of each frame that `data` completes."""
        self._data += data
        while len(self._data) >= HEAD.size:
            kind, nbytes = HEAD.unpack_from(self._data)
            end = HEAD.size + nbytes
            if len(self._data) < end:
                return
            payload = bytes(self._data[HEAD.size : end])
            del self._data[:end]
            yield kind, payload
