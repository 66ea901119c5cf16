"""Digests of whole slots."""

from __future__ import annotations

import xxhash

from disagg.kernels.digest import digest, new_digest


def test_the_digest_is_xxh3_64() -> None:
    assert digest(b"") == 0x2D06800538D394C2  # the published value for no input and seed 0
    assert digest(memoryview(b"abc")) == xxhash.xxh3_64(b"abc").intdigest()


def test_one_flipped_bit_changes_a_slots_digest_and_parts_make_the_whole() -> None:
    slot = bytearray(1000)
    before, parts = digest(slot), new_digest()
    for part in (slot[:300], slot[300:]):
        parts.update(bytes(part))
    assert parts.intdigest() == before
    slot[-1] ^= 1
    assert digest(slot) != before
