"""Digest of one wire unit: detects accidents. What binds it to a request is the manifest's MAC."""

from __future__ import annotations

import xxhash


def digest(data: bytes | bytearray | memoryview) -> int:
    """xxh3-64 of contiguous bytes, in [0, 2**64). Releases the GIL for large buffers."""
    return int(xxhash.xxh3_64_intdigest(data))


def new_digest() -> xxhash.xxh3_64:
    """`digest` of bytes that come in parts: `update` with each, then `intdigest`."""
    return xxhash.xxh3_64()
