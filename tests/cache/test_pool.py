from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles.cache_oracle import tiny_layout

from disagg.cache import slot_memory
from disagg.cache.errors import PoolExhausted, PoolMemoryShort
from disagg.cache.pool import NULL_SLOT, TRASH_SLOT, SlotPool
from disagg.cache.slot_memory import SlotMemory


@pytest.fixture
def pool():
    pool = SlotPool(slot_nbytes=64, num_slots=10)
    yield pool
    pool.close()


def test_reserved_slots_are_never_handed_out(pool):
    assert sorted(pool.allocate(8)) == list(range(2, 10))
    assert pool.num_free == 0
    with pytest.raises(PoolExhausted, match="1 slots of 64 bytes asked, 0 free"):
        pool.allocate(1)
    pool.check_invariants()


def test_slots_are_zero_when_they_are_handed_out_even_after_use(pool):
    slots = pool.allocate(3)
    pool.memory[slots] = 0xFF
    pool.free(slots)
    assert not pool.memory[pool.allocate(8)].any()


def test_a_wiped_slot_is_zero_while_it_is_free(pool):
    slots = pool.allocate(2)
    pool.memory[slots] = 0xFF
    pool.free(slots, wipe=True)
    assert not pool.memory[slots].any()


def test_the_generation_rises_at_allocation_and_at_free(pool):
    before = pool.generations.copy()
    (slot,) = pool.allocate(1)
    assert pool.generations[slot] == before[slot] + 1
    pool.free([slot])
    assert pool.generations[slot] == before[slot] + 2
    assert pool.generations[NULL_SLOT] == pool.generations[TRASH_SLOT] == 0


def test_the_generation_rises_before_the_first_byte_changes(pool, monkeypatch):
    slots = pool.allocate(2)
    pool.memory[slots] = 7
    pool.free(slots)
    seen = []
    zero = SlotMemory.zero
    monkeypatch.setattr(
        SlotMemory,
        "zero",
        lambda self, s: (seen.append((self.generations[s].copy(), bool(self.slots[s].any()))), zero(self, s)),
    )
    pool.allocate(2)
    generations, still_old_bytes = seen[0]
    assert generations.tolist() == [3, 3]
    assert still_old_bytes


def test_a_run_is_preferred_to_scattered_slots(pool):
    slots = pool.allocate(8)
    pool.free([slots[0], slots[2], *slots[4:7]])
    assert pool.allocate(3) == slots[4:7]
    assert pool.allocate(2) == [slots[0], slots[2]]


def test_single_slots_come_lowest_first(pool):
    slots = pool.allocate(4)
    pool.free([slots[2], slots[1]])
    assert pool.allocate(1) == [slots[1]]


@pytest.mark.parametrize("wrong", [[NULL_SLOT], [TRASH_SLOT], [5], [2, 2]])
def test_freeing_what_is_not_held_is_caught(pool, wrong):
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.free(wrong)


def test_a_written_null_slot_is_caught(pool):
    pool.memory[NULL_SLOT, 3] = 1
    with pytest.raises(AssertionError, match="NULL slot"):
        pool.check_invariants()


def test_counts_and_peak_follow_the_slots(pool):
    slots = pool.allocate(5)
    pool.free(slots[:4])
    assert (pool.num_slots, pool.num_used, pool.num_free, pool.peak_used) == (10, 1, 7, 5)


def test_another_mapping_of_the_memfd_sees_generations_then_slots(pool):
    (slot,) = pool.allocate(1)
    pool.memory[slot] = torch.arange(64, dtype=torch.uint8)
    size = os.fstat(pool.sides.fd).st_size
    assert size == pool.sides.slots_offset + 10 * 64
    assert pool.sides.slots_offset % mmap.PAGESIZE == 0
    with mmap.mmap(pool.sides.fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
        assert np.frombuffer(seen[: 10 * 8], dtype=np.uint64)[slot] == 1
        start = pool.sides.slots_offset + slot * 64
        assert seen[start : start + 64] == bytes(range(64))


def test_the_memfd_is_sealed_against_size_changes_and_later_writers(pool):
    for change in (lambda: os.ftruncate(pool.sides.fd, 0), lambda: os.ftruncate(pool.sides.fd, 1 << 20)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        mmap.mmap(pool.sides.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(pool.sides.fd, fcntl.F_ADD_SEALS, 0)


def test_a_view_outlives_the_pools_file(pool):
    memory = pool.memory
    pool.close()
    pool.close()
    memory[2] = 1
    assert memory[2].sum() == 64


def test_a_pool_larger_than_memory_is_refused_with_both_numbers():
    with pytest.raises(PoolMemoryShort, match=r"\d{15,} bytes asked, \d+ bytes free; lower `--kv-cache-memory`"):
        SlotPool(slot_nbytes=1 << 30, num_slots=1 << 22)


def num_resident(pool) -> int:
    """Pages of the memfd that this process has mapped, as the kernel counts them."""
    lines = Path("/proc/self/smaps").read_text().split("disagg-kv-pool")
    (facts,) = [
        part for part in lines[1:] if f"Size: {os.fstat(pool.sides.fd).st_size // 1024} kB" in " ".join(part.split())
    ]
    return int(facts.split("Rss:")[1].split()[0]) * 1024 // mmap.PAGESIZE


def test_every_page_is_there_and_mapped_when_a_pool_is_made_in_steps_that_are_told(monkeypatch):
    monkeypatch.setattr(slot_memory, "FILL_NBYTES", 1 << 20)
    told = []
    pool = SlotPool(slot_nbytes=mmap.PAGESIZE, num_slots=700, on_filled=told.append)
    size = os.fstat(pool.sides.fd).st_size
    assert told == [1 << 20, 1 << 20, size - (2 << 20)]
    assert num_resident(pool) == size // mmap.PAGESIZE
    pool.close()


def test_an_older_kernel_maps_pages_as_they_are_touched(monkeypatch):
    monkeypatch.setattr(slot_memory, "_MADV_POPULATE_WRITE", 1 << 20)
    pool = SlotPool(slot_nbytes=mmap.PAGESIZE, num_slots=701)
    assert num_resident(pool) == 0
    pool.memory[700] = 1
    assert os.fstat(pool.sides.fd).st_blocks * 512 >= 701 * mmap.PAGESIZE, "they exist all the same"
    pool.close()


def test_a_kernel_that_has_no_room_is_refused_with_both_numbers(monkeypatch):
    def full(fd, offset, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slot_memory.os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PoolMemoryShort, match="bytes asked"):
        SlotPool(slot_nbytes=64, num_slots=10)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pool_on_a_device_keeps_the_same_rules():
    pool = SlotPool(64, 10, "cuda")
    slots = pool.allocate(8)
    pool.memory[slots] = 3
    pool.free(slots[1::2])
    assert not pool.memory[pool.allocate(3)].any()
    pool.check_invariants()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_staged_pool_shows_peers_what_was_published_and_kernels_what_was_taken_in(device):
    pool = SlotPool(64, 10, device, is_staged=True)
    first, second, third = pool.allocate(3)
    pool.memory[first], pool.sides.host[second] = 7, 8
    assert not pool.sides.host[first].any()
    assert not pool.memory[second].any()
    pool.sides.publish(np.array([first, third]))
    pool.sides.take_in(np.array([second]))
    assert (pool.sides.host[first] == 7).all()
    assert (pool.memory[second] == 8).all()
    pool.free([first, second])
    assert pool.allocate(2) == [first, second]
    assert not pool.memory[[first, second]].any()
    assert not pool.sides.host[[first, second]].any()
    pool.check_invariants()
    pool.close()


def test_without_a_host_side_of_its_own_both_are_one():
    pool = SlotPool(64, 10)
    (slot,) = pool.allocate(1)
    pool.memory[slot] = 7
    assert (pool.sides.host[slot] == 7).all()
    assert pool.sides.host.data_ptr() == pool.memory.data_ptr()
    pool.close()


def test_a_view_has_the_slot_layout_layer_kv_head_token_dim():
    layout = tiny_layout(8, 8, 8, block_size=4)
    pool = SlotPool(layout.slot_nbytes[0], 5)
    view = pool.view(layout.groups[0], 4)
    assert view.shape == (5, 3, 2, 1, 4, 2)
    view[3, 1, 1, 0, 2, 1] = 5.0
    flat = pool.memory[3].view(torch.float32)
    assert flat.nonzero().tolist() == [[((1 * 2 + 1) * 4 + 2) * 2 + 1]]
    pool.close()


def test_a_slot_that_peers_were_shown_gets_another_generation_before_it_is_written_again(pool):
    slot, other = pool.allocate(2)
    before = pool.generations.copy()
    pool.rename([slot])
    assert pool.generations[slot] == before[slot] + 2
    assert pool.generations[other] == before[other]
    pool.check_invariants()
    pool.share(np.array([slot]))
    with pytest.raises(AssertionError, match="that is shared"):
        pool.rename([slot])
