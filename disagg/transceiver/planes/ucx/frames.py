"""What crosses a connection of the ucx plane beside UCX itself: an ordinary socket, next to each pair of endpoints.

Receiver: the greeting with its token. Sender: `WELCOME`, then its UCX address; receiver: its own; a message each way
through UCX; sender: `READY`. From then on the sender writes one header of the tcp plane per slice, while the slice's
bytes go through UCX in chunks; the receiver writes `CREDIT` for each slice that UCX has brought, and `PROBE` once. The
socket's end is the peer's death, at once and whatever UCX knows of it.

Tags: 32 bits that only these two know (a hash of transfer and epoch, keyed with the connection's token), slice, chunk.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Final

from disagg.transceiver.wire.errors import RemoteProtocolError

READY: Final = b"R"
CREDIT: Final = b"C"
PROBE: Final = b"P"

CHUNK_NBYTES: Final = 2 << 20
"""Large enough that UCX's and Python's cost of a message, 30 us, is a tenth of moving it; small enough that what was
gathered is still in the cache when it leaves. Fixed: both ends cut slices alike."""

WINDOW: Final = 16
"""Slices sent that UCX has not brought yet, per receiver. Large ones wait in the sender's staging anyway; this bounds
what UCX buffers of small ones, which it sends before they are asked for."""

_ADDRESS: Final = struct.Struct("<H")
MAX_ADDRESS_NBYTES: Final = 16 << 10
"""An address names every device: some 60 bytes each."""

_CHUNK_BITS: Final = 12
_SLICE_BITS: Final = 20
MAX_CHUNKS: Final = 1 << _CHUNK_BITS
"""8 GiB in one slice."""


def transfer_bits(token: bytes, name: tuple[bytes, int]) -> int:
    """The 32 bits of a transfer's tags. `name`: `wire_name`."""
    transfer, epoch = name
    digest = blake2b(transfer + epoch.to_bytes(8, "little"), key=token, digest_size=4).digest()
    return int.from_bytes(digest, "little")


def chunk_tag(bits: int, number: int, chunk: int) -> int:
    """Unlike for any two chunks under way. A slice's number may wrap: far fewer than 2^20 are under way."""
    return bits << 32 | (number & ((1 << _SLICE_BITS) - 1)) << _CHUNK_BITS | chunk


def chunks(nbytes: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of a slice."""
    return [(start, min(start + CHUNK_NBYTES, nbytes)) for start in range(0, nbytes, CHUNK_NBYTES)]


def pack_address(address: bytes) -> bytes:
    return _ADDRESS.pack(len(address)) + address


def address_nbytes(prefix: bytes) -> int:
    """Bytes of the address that follows. Raises `RemoteProtocolError`."""
    (nbytes,) = _ADDRESS.unpack(prefix)
    if not 0 < nbytes <= MAX_ADDRESS_NBYTES:
        raise RemoteProtocolError(f"ucx: an address of {nbytes} bytes")
    return int(nbytes)
