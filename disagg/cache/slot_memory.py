"""Where a pool's slots lie: on CPU one sealed memfd, which a peer on this host may map for reading.

memfd layout: the generations (one aligned uint64 per slot) rounded up to pages, then the slots.

On an accelerator kernels read and write device memory, and peers never do: the memfd is the slots' *host side*, of
equal size. A slot is published to it when it is final, and taken in from it when what a peer sent was verified. So
every data plane, digest and check works alike, and a device pool costs as much host memory as it has slots.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.cache.errors import PoolMemoryShort
from disagg.cache.host_memory import available_nbytes
from disagg.cache.staging import Staging

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; python's fcntl names it from 3.13 on
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

Slots = NDArray[np.int64]

OnFilled = Callable[[int], None]
"""Told of bytes that became this process's, while a pool is made."""

_MADV_POPULATE_WRITE = 23  # linux/mman.h, from 5.14 on; python names it from no version on

FILL_NBYTES: Final = 256 << 20
"""Filled at a time: pages are zeroed at 1 to 4 GB/s, so progress is told several times a second."""


def ignore(nbytes: int) -> None:
    """No progress is shown."""


class SlotMemory:
    """`slots`: uint8 [num_slots, slot_nbytes], what kernels use. `host`: the same slots as peers see them.

    `generations`: uint64 [num_slots], in the memfd. `slots_offset`: where the slots begin in the memfd `fd`.
    `is_staged`: the host side is memory of its own, as on every accelerator; tests ask for it on CPU.
    Every page exists and is mapped from the start, so that no step pays for its first touch; `on_filled` is told as
    they come. Raises PoolMemoryShort when machine or device has no room.
    """

    def __init__(
        self,
        slot_nbytes: int,
        num_slots: int,
        device: str,
        *,
        is_staged: bool = False,
        on_filled: OnFilled = ignore,
    ) -> None:
        self.is_staged = is_staged or torch.device(device).type != "cpu"
        self.slots_offset = -(-num_slots * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = -1
        self.host, self.generations = self._map_memfd(slot_nbytes, num_slots, on_filled)
        self._host_bytes = self.host.numpy()
        try:
            self.slots = self._on_device(device) if self.is_staged else self.host
        except PoolMemoryShort:
            self.close()
            raise
        self._staging = Staging(self.slots) if self.is_staged else None

    def zero(self, slots: Slots) -> None:
        """On both sides. On the host by numpy: torch would wake its threads for a slot or two."""
        if not len(slots):
            return
        is_run = slots[-1] - slots[0] == len(slots) - 1
        run = slice(int(slots[0]), int(slots[-1]) + 1)
        self._host_bytes[run if is_run else slots] = 0
        if self.is_staged:
            self.slots[run if is_run else self._index(slots)] = 0

    def publish(self, slots: Slots) -> None:
        """Copy final slots to the host side, before any peer is told of them. Waits for the kernels that wrote them.

        A slot that several sequences share is written again with the same bytes, which no reader can tell.
        """
        if self._staging is not None:
            for some, rows in self._staging.read(slots):
                self._host_bytes[some] = rows

    def take_in(self, slots: Slots) -> None:
        """Copy landed slots from the host side, in order with the kernels that will read them."""
        if self._staging is not None:
            self._staging.write(slots, self._host_bytes)

    def close(self) -> None:
        """Close the memfd. The mapping itself goes when the last view of it does: a tensor must never dangle."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _index(self, slots: Slots) -> torch.Tensor:
        return torch.from_numpy(slots).to(self.slots.device)

    def _map_memfd(
        self, slot_nbytes: int, num_slots: int, on_filled: OnFilled
    ) -> tuple[torch.Tensor, NDArray[np.uint64]]:
        nbytes = self.slots_offset + num_slots * slot_nbytes
        self.fd = _sized_memfd(nbytes)
        try:
            mapping = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            _fill(self.fd, mapping, on_filled)
            # FUTURE_WRITE spares the mapping above and refuses later writable ones: the only writer is this process.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except (OSError, PoolMemoryShort):
            self.close()
            raise
        flat = torch.frombuffer(mapping, dtype=torch.uint8, offset=self.slots_offset)
        return flat.view(num_slots, slot_nbytes), np.frombuffer(mapping, dtype=np.uint64, count=num_slots)

    def _on_device(self, device: str) -> torch.Tensor:
        try:
            return torch.zeros(self.host.shape, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as exc:
            free = torch.cuda.mem_get_info(device)[0]
            raise _memory_short(self.host.nbytes, free, device) from exc


def _sized_memfd(nbytes: int) -> int:
    if nbytes > (free := available_nbytes()):  # asked first: the kernel would rather kill a process than say ENOSPC
        raise _memory_short(nbytes, free, "cpu")
    fd = os.memfd_create("disagg-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    return fd


def _fill(fd: int, mapping: mmap.mmap, on_filled: OnFilled) -> None:
    """Make every page of the memfd, so that no later write can end in SIGBUS, and map it here.

    Raises PoolMemoryShort.
    """
    total = len(mapping)
    for start in range(0, total, FILL_NBYTES):
        count = min(FILL_NBYTES, total - start)
        try:
            os.posix_fallocate(fd, start, count)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EINVAL):
                raise _memory_short(total, available_nbytes(), "cpu") from exc
            raise
        with contextlib.suppress(OSError):  # an older kernel maps pages as they are first touched
            mapping.madvise(_MADV_POPULATE_WRITE, start, count)
        on_filled(count)


def _memory_short(nbytes: int, free: int, device: str) -> PoolMemoryShort:
    return PoolMemoryShort(
        f"KV cache pool on `{device}`: {nbytes} bytes asked, {free} bytes free; lower `--kv-cache-memory`"
    )
