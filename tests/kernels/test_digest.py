"""Digests of whole slots."""

from __future__ import annotations

import torch
import xxhash

from disagg.kernels.digest import digest, digest_slot


def test_the_digest_is_xxh3_64() -> None:
    assert digest(b"") == 0x2D06800538D394C2  # the published value for no input and seed 0
    assert digest(memoryview(b"abc")) == xxhash.xxh3_64(b"abc").intdigest()


def test_one_flipped_bit_changes_a_slots_digest() -> None:
    memory = torch.zeros(2, 1000, dtype=torch.uint8)
    before = digest_slot(memory, 1)
    memory[1, -1] ^= 1
    assert digest_slot(memory, 1) != before == digest_slot(memory, 0)
