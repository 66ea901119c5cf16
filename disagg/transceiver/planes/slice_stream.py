"""What crosses a connection of the tcp plane: a greeting, one byte of welcome, then slices, each behind one header.

Header, 32 bytes: transfer (16 bytes), epoch, slice, payload bytes, CRC-32 of all before (uint32 each); little endian.
The payload is the slice's slots in its order and nothing between them: both ends know which slots they are. A payload
that was damaged on the way is found by its digests; a header needs a check of its own, because what follows a wrong one
is waited for in vain.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final
from urllib.parse import urlsplit

from disagg.transceiver.layout.runs import Ints, adjacent
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.wire.errors import RemoteProtocolError

WELCOME: Final = b"W"
PROBE: Final = b"P"
"""All that a receiver may say after its greeting, once: send the probe's slices."""

HEADER: Final = struct.Struct("<16sIIII")
_CHECKED: Final = struct.Struct("<16sIII")

MAX_VECTORS: Final = 64
"""Runs per system call: enough that its own cost, a microsecond, is below a tenth of copying 64 runs of 16 KiB."""


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """`name`: (16 bytes of the transfer, epoch)."""

    name: tuple[bytes, int]
    number: int
    nbytes: int

    def pack(self) -> bytes:
        checked = _CHECKED.pack(*self.name, self.number, self.nbytes)
        return checked + zlib.crc32(checked).to_bytes(4, "little")

    @classmethod
    def parse(cls, data: bytes | bytearray) -> SliceHeader:
        """Raises `RemoteProtocolError` for bytes that are no header."""
        transfer, epoch, number, nbytes, check = HEADER.unpack(data)
        if zlib.crc32(data[: _CHECKED.size]) != check:
            raise RemoteProtocolError("tcp: a header was damaged on the way")
        return cls((transfer, epoch), number, nbytes)


@lru_cache(maxsize=1024)  # every slice asks; more transfers than this are never live at once
def wire_name(transfer_id: str, epoch: int) -> tuple[bytes, int]:
    """A transfer's id in 16 bytes whatever its spelling: a digest, which two of a worker's transfers never share."""
    return blake2b(transfer_id.encode(), digest_size=16).digest(), epoch


def run_views(regions: Sequence[PoolRegion], pools: Ints, slots: Ints) -> list[memoryview]:
    """The bytes of these slots where they lie: one flat view per run of adjacent slots."""
    views = []
    for start, stop in adjacent(pools, slots):
        first = int(slots[start])
        rows = regions[int(pools[start])].slots[first : first + stop - start]
        views.append(rows.data.cast("B"))
    return views


def advance(views: list[memoryview], nbytes: int) -> None:
    """Take `nbytes` off the front of `views`, which the kernel has read or filled."""
    done = 0
    while done < len(views) and nbytes >= len(views[done]):
        nbytes -= len(views[done])
        done += 1
    del views[:done]
    if nbytes:
        views[0] = views[0][nbytes:]


def check_size(header: SliceHeader, limit: int) -> None:
    """Raise `RemoteProtocolError` for a slice larger than any plan makes: its connection ends."""
    if header.nbytes > limit:
        raise RemoteProtocolError(f"slice {header.number} of {header.nbytes} bytes, at most {limit} are legal")


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of an offer's address. Raises `ValueError`."""
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ValueError(f"{address!r} is no address: expected tcp://HOST:PORT")
    return parts.hostname, parts.port
