"""Pools of random bytes that a plane can serve or fill, made without the cache's own code."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from disagg.transceiver.memory.regions import PoolRegion

_F_SEAL_FUTURE_WRITE = 0x10
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def make_pool(num_slots: int, slot_nbytes: int, *, seed: int = 0, seals: int = SEALS) -> PoolRegion:
    """A sealed memfd with random slots; generation of slot s is 100 + s. Close its `fd`."""
    slots_offset = -(-num_slots * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = slots_offset + num_slots * slot_nbytes
    fd = os.memfd_create("test-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, nbytes)
    memory = np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    region = PoolRegion(
        slots=memory[slots_offset:].reshape(num_slots, slot_nbytes),
        generations=memory[: 8 * num_slots].view(np.uint64),
        fd=fd,
        slots_offset=slots_offset,
    )
    rng = np.random.default_rng(seed)
    region.slots[:] = rng.integers(0, 256, region.slots.shape, dtype=np.uint8)
    region.generations[:] = 100 + np.arange(num_slots, dtype=np.uint64)
    return region


def make_pools(shapes: Sequence[tuple[int, int]], *, seed: int = 0) -> tuple[PoolRegion, ...]:
    return tuple(make_pool(*shape, seed=seed + index) for index, shape in enumerate(shapes))


def close_pools(pools: Sequence[PoolRegion]) -> None:
    for pool in pools:
        os.close(pool.fd)
