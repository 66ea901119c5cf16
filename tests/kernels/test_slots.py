"""Gather, scatter and digests of whole slots."""

from __future__ import annotations

import pytest
import torch
import xxhash

from disagg.kernels import ops
from disagg.kernels.digest import digest, digest_slot


@pytest.mark.parametrize("nbytes", [1, 13, 4096])
def test_scatter_undoes_gather(nbytes: int) -> None:
    memory = torch.randint(0, 256, (11, nbytes), dtype=torch.uint8)
    slots = torch.tensor([7, 2, 10])
    staging = ops.gather_slots(memory, slots, torch.empty(3, nbytes, dtype=torch.uint8))
    assert torch.equal(staging[1], memory[2])
    other = torch.zeros_like(memory)
    ops.scatter_slots(other, slots, staging)
    assert torch.equal(other[slots], memory[slots])
    assert other[[0, 1, 3, 4, 5, 6, 8, 9]].sum() == 0


def test_gathering_nothing_changes_nothing() -> None:
    memory = torch.ones(3, 5, dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    staging = ops.gather_slots(memory, none, torch.empty(0, 5, dtype=torch.uint8))
    ops.scatter_slots(memory, none, staging)
    assert memory.sum() == 15


def test_the_digest_is_xxh3_64() -> None:
    assert digest(b"") == 0x2D06800538D394C2  # the published value for no input and seed 0
    assert digest(memoryview(b"abc")) == xxhash.xxh3_64(b"abc").intdigest()


def test_one_flipped_bit_changes_a_slots_digest() -> None:
    memory = torch.zeros(2, 1000, dtype=torch.uint8)
    before = digest_slot(memory, 1)
    memory[1, -1] ^= 1
    assert digest_slot(memory, 1) != before == digest_slot(memory, 0)
