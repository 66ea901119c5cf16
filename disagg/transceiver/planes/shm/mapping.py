"""A peer's pool, mapped read-only into this process."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Final

import numpy as np

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.shm.handshake import PoolShape

_MADV_POPULATE_READ: Final = 22  # Linux 5.14; Python 3.11 does not name it
_PAGE_NBYTES: Final = 4096
_ADVISED_NBYTES: Final = 16 << 20
"""Per call of `madvise`, which holds the process's memory map against every thread that maps, unmaps or faults: in one
call over a large pool that is long enough to count as lost. So much takes 15 ms."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PoolMapping:
    """Maps `fd` and faults every page in, so that no copy pays for page faults (four times slower, measured).

    MAP_POPULATE would do the same inside `mmap`, but Python holds the GIL there, 0.1 s or more per GiB, and the event
    loop would stand still: `madvise` through ctypes releases it. Blocks; call it in a thread.
    """

    def __init__(self, fd: int, shape: PoolShape) -> None:
        self._map = mmap.mmap(fd, shape.nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        memory = np.frombuffer(self._map, dtype=np.uint8)
        self._address = memory.ctypes.data
        self._nbytes = shape.nbytes
        if not self._advise(_MADV_POPULATE_READ):
            memory[::_PAGE_NBYTES].max()  # an older kernel: touch each page
        self.region = PoolRegion(
            slots=memory[shape.slots_offset :].reshape(shape.num_slots, shape.slot_nbytes),
            generations=memory[: 8 * shape.num_slots].view(np.uint64),
            fd=-1,
            slots_offset=shape.slots_offset,
        )

    def close(self) -> None:
        """Unmap; where a view still lives, in the traceback of a failed copy say, the memory goes with that view."""
        del self.region
        self._advise(mmap.MADV_DONTNEED)  # the slow part of unmapping, without the GIL
        with contextlib.suppress(BufferError):  # the view that still lives
            self._map.close()

    def _advise(self, advice: int) -> bool:
        """Whether the kernel took the advice."""
        for start in range(0, self._nbytes, _ADVISED_NBYTES):
            if _libc.madvise(self._address + start, min(_ADVISED_NBYTES, self._nbytes - start), advice) != 0:
                return False
        return True
