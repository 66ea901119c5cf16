"""One pool: memory cut into equal slots, on CPU a sealed memfd that a peer on this host may map for reading.

memfd layout: the generations (one aligned uint64 per slot) rounded up to pages, then the slots. A slot's generation is
raised at each allocation and each free, *before* the slot's first byte changes, so a reader that sees the same even or
odd number before and after its copy has an early, cheap hint that nothing moved; the digest is the proof.
An allocated slot has an odd generation, a free one an even one.

Two slots are reserved: NULL is always zero and the only one that padding reads; TRASH is the only one that padding
writes, and never read. Every other slot is zeroed when it is allocated, so no kernel ever loads a non-finite byte.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.cache.errors import PoolExhausted, PoolMemoryShort
from disagg.cache.host_memory import available_nbytes
from disagg.cache.layout import LayerGroup

NULL_SLOT = 0
TRASH_SLOT = 1
NUM_RESERVED_SLOTS = 2

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; python's fcntl names it from 3.13 on
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class SlotPool:
    """`num_slots` slots of `slot_nbytes` bytes, the two reserved ones included. Single threaded.

    `memory`: uint8 [num_slots, slot_nbytes]. `generations`: uint64 [num_slots]. `fd`: the memfd, -1 on an accelerator.
    `slots_offset`: where the slots begin in the memfd. Raises PoolMemoryShort when the machine has no room.
    """

    def __init__(self, slot_nbytes: int, num_slots: int, device: str = "cpu") -> None:
        assert slot_nbytes > 0
        assert num_slots > NUM_RESERVED_SLOTS, "a pool of reserved slots seats nothing"
        self.slot_nbytes, self.num_slots, self.device = slot_nbytes, num_slots, device
        self.slots_offset = -(-num_slots * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = -1
        self.memory: torch.Tensor
        self.generations: NDArray[np.uint64]
        if torch.device(device).type == "cpu":
            self._map_memfd()
        else:
            self._allocate_on_device()
        self._is_free: NDArray[np.bool_] = np.ones(num_slots, dtype=np.bool_)
        self._is_free[:NUM_RESERVED_SLOTS] = False
        self.num_free = num_slots - NUM_RESERVED_SLOTS
        self.peak_used = 0

    @property
    def num_used(self) -> int:
        """Slots that sequences hold; the reserved ones do not count."""
        return self.num_slots - NUM_RESERVED_SLOTS - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` slots, zeroed, as one run where one is free, else the lowest. PoolExhausted changes nothing."""
        if count > self.num_free:
            raise PoolExhausted(f"{count} slots of {self.slot_nbytes} bytes asked, {self.num_free} free")
        slots = self._choose(count)
        self._is_free[slots] = False
        self.num_free -= count
        self.peak_used = max(self.peak_used, self.num_used)
        self.generations[slots] += np.uint64(1)
        self._zero(slots)
        return [int(slot) for slot in slots]

    def free(self, slots: Sequence[int], *, wipe: bool = False) -> None:
        """Give slots back. `wipe` zeroes them now: for a sequence that may have left NaN or Inf behind."""
        index = np.asarray(slots, dtype=np.int64)
        assert (index >= NUM_RESERVED_SLOTS).all(), "a reserved slot was freed"
        assert not self._is_free[index].any(), "a free slot was freed"
        assert len(np.unique(index)) == len(index), "a slot was freed twice in one call"
        self.generations[index] += np.uint64(1)
        if wipe:
            self._zero(index)
        self._is_free[index] = True
        self.num_free += len(index)

    def is_free(self, slot: int) -> bool:
        return bool(self._is_free[slot])

    def view(self, group: LayerGroup, block_size: int) -> torch.Tensor:
        """The pool as `group` sees it: [num_slots, layers, 2 (K, V), kv_heads, block_size, head_dim], no copy."""
        assert group.slot_nbytes(block_size) == self.slot_nbytes
        elements = self.memory.view(getattr(torch, group.dtype))
        shape = (self.num_slots, len(group.layers), 2, group.num_kv_heads, block_size, group.head_dim)
        return elements.view(shape)

    def close(self) -> None:
        """Close the memfd. The mapping itself goes when the last view of it does: a tensor must never dangle."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_invariants(self) -> None:
        assert not self._is_free[:NUM_RESERVED_SLOTS].any(), "a reserved slot is free"
        assert int(self._is_free.sum()) == self.num_free, "num_free does not count the free slots"
        assert not self.generations[:NUM_RESERVED_SLOTS].any(), "a reserved slot changed hands"
        assert ((self.generations[NUM_RESERVED_SLOTS:] % 2 == 0) == self._is_free[NUM_RESERVED_SLOTS:]).all()
        assert not self.memory[NULL_SLOT].any(), "the NULL slot was written"

    def _choose(self, count: int) -> NDArray[np.int64]:
        """First run of `count` free slots, else the lowest ones: runs make transfers and copies few and large."""
        free = np.flatnonzero(self._is_free)
        if count > 1:
            starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
            if len(starts):
                return free[starts[0] : starts[0] + count]
        return free[:count]

    def _zero(self, slots: NDArray[np.int64]) -> None:
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1:
            self.memory[int(slots[0]) : int(slots[-1]) + 1].zero_()  # one memset instead of an indexed write
        elif len(slots):
            self.memory[torch.from_numpy(slots).to(self.memory.device)] = 0

    def _map_memfd(self) -> None:
        nbytes = self.slots_offset + self.num_slots * self.slot_nbytes
        self.fd = _sized_memfd(nbytes)
        try:
            mapping = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            # FUTURE_WRITE spares the mapping above and refuses later writable ones: the only writer is this process.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            self.close()
            raise
        self.generations = np.frombuffer(mapping, dtype=np.uint64, count=self.num_slots)
        flat = torch.frombuffer(mapping, dtype=torch.uint8, offset=self.slots_offset)
        self.memory = flat.view(self.num_slots, self.slot_nbytes)

    def _allocate_on_device(self) -> None:
        nbytes = self.num_slots * self.slot_nbytes
        try:
            self.memory = torch.zeros(self.num_slots, self.slot_nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as exc:
            free = torch.cuda.mem_get_info(self.device)[0]
            raise _memory_short(nbytes, free, self.device) from exc
        self.generations = np.zeros(self.num_slots, dtype=np.uint64)


def _sized_memfd(nbytes: int) -> int:
    """A memfd whose every page exists already, so that no later write can end in SIGBUS."""
    if nbytes > (free := available_nbytes()):  # asked first: the kernel would rather kill a process than say ENOSPC
        raise _memory_short(nbytes, free, "cpu")
    fd = os.memfd_create("disagg-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as exc:
        os.close(fd)
        if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINVAL):
            raise _memory_short(nbytes, available_nbytes(), "cpu") from exc
        raise
    return fd


def _memory_short(nbytes: int, free: int, device: str) -> PoolMemoryShort:
    return PoolMemoryShort(
        f"KV cache pool on `{device}`: {nbytes} bytes asked, {free} bytes free; lower `--kv-cache-memory`"
    )
