"""What the two ends of the zmq plane say: heads of messages. Only a `slice` has one more frame, its payload.

receiver -> sender: `hello` (token, incarnation), `credit` (so many slices were landed or discarded), `probe`: send the
slices by which a first contact is measured.
sender -> receiver: `welcome`, `refused`, `slice` (transfer, epoch, number, payload bytes).

A head ends with the CRC-32 of all before it. What is damaged in a payload is found by its digests; a damaged head would
be a slice or a credit that a caller waits for in vain, so it ends the connection at once. Under CURVE none arrives.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from disagg.transceiver.planes.tokens import TOKEN_NBYTES
from disagg.transceiver.wire.errors import RemoteProtocolError

WINDOW: Final = 8
"""Slices on their way or waiting to be landed, per receiver. With 8 MiB slices this bounds what a receiver holds to
64 MiB per source; with 32 KiB slices it still covers 250 KiB per round trip, 1 GB/s at the 0.2 ms of one switch."""

WELCOME: Final = b"W"
REFUSED: Final = b"R"
_PROBE: Final = b"P"
_HELLO: Final = b"H"
_CREDIT: Final = b"C"
_SLICE: Final = b"S"
_COUNT: Final = struct.Struct("<I")
_SLICE_HEAD: Final = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class DataHello:
    incarnation: str
    token: bytes


@dataclass(frozen=True, slots=True)
class Credit:
    num_slices: int


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """Asked for once per connection."""


@dataclass(frozen=True, slots=True)
class SliceHead:
    transfer_id: str
    epoch: int
    number: int
    nbytes: int


def pack(head: DataHello | Credit | ProbeRequest | SliceHead) -> bytes:
    return seal(_pack(head))


def seal(body: bytes) -> bytes:
    """`body` and its checksum."""
    return body + _COUNT.pack(zlib.crc32(body))


def _pack(head: DataHello | Credit | ProbeRequest | SliceHead) -> bytes:
    match head:
        case DataHello(incarnation, token):
            return _HELLO + token + incarnation.encode()
        case Credit(num_slices):
            return _CREDIT + _COUNT.pack(num_slices)
        case ProbeRequest():
            return _PROBE
        case SliceHead(transfer_id, epoch, number, nbytes):
            return _SLICE + _SLICE_HEAD.pack(epoch, number, nbytes) + transfer_id.encode()


def parse(data: bytes) -> DataHello | Credit | ProbeRequest | SliceHead:
    """The head in `data`. Raises `RemoteProtocolError`."""
    data, check = data[: -_COUNT.size], data[-_COUNT.size :]
    if _COUNT.pack(zlib.crc32(data)) != check:
        raise RemoteProtocolError("a head of a data message was damaged on the way")
    kind, body = data[:1], data[1:]
    try:
        if kind == _HELLO and len(body) > TOKEN_NBYTES:
            return DataHello(body[TOKEN_NBYTES:].decode(), body[:TOKEN_NBYTES])
        if kind == _CREDIT:
            return Credit(*_COUNT.unpack(body))
        if data == _PROBE:
            return ProbeRequest()
        if kind == _SLICE:
            epoch, number, nbytes = _SLICE_HEAD.unpack_from(body)
            return SliceHead(body[_SLICE_HEAD.size :].decode(), epoch, number, nbytes)
    except (struct.error, UnicodeDecodeError) as exc:
        raise RemoteProtocolError(f"malformed head of a data message: {exc}") from exc
    raise RemoteProtocolError(f"data message of unknown kind {kind!r}")
