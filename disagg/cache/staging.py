"""Between a device's slots and their host side: slots are gathered, moved in one piece, and spread again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.kernels import ops

Slots = NDArray[np.int64]
Bytes = NDArray[np.uint8]

STAGING_NBYTES: Final = 16 << 20
"""On the device and in pinned memory, per pool: at 16 GB/s a millisecond's worth, which no launch is felt beside."""


def staging_nbytes(slot_nbytes: Sequence[int]) -> int:
    """The most that the buffers of pools with slots of these sizes take on a device, and again in host memory."""
    return sum(_num_rows(nbytes) * nbytes for nbytes in slot_nbytes)


def _num_rows(slot_nbytes: int) -> int:
    return max(1, STAGING_NBYTES // max(1, slot_nbytes))


class Staging:
    """A buffer on the device of `slots` (uint8 `[num_slots, slot_nbytes]`) and one in host memory that it reaches.

    Scattered slots cost a launch and a copy, not a copy each; pinned memory is read and written at the bus's pace.
    For the thread whose stream the kernels run on. The buffers are made when they are first needed.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        self._slots = slots
        self._num_rows = min(len(slots), _num_rows(slots.shape[1]))
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_read: torch.cuda.Event | None = None  # the device has what was last put into the host's buffer

    def read(self, chosen: Slots) -> Iterator[tuple[Slots, Bytes]]:
        """Some of `chosen` at a time and their bytes, good until the next. Waits for the kernels that wrote them."""
        for some, here, there in self._rounds(chosen):
            ops.gather_slots(self._slots, self._index(some), there)
            here.copy_(there, non_blocking=True)
            self._wait()
            yield some, here.numpy()

    def write(self, chosen: Slots, host: Bytes) -> None:
        """Copy rows `chosen` of `host`, in order with the kernels that will read them. Does not wait for these."""
        for some, here, there in self._rounds(chosen):
            if self._is_read is not None:
                self._is_read.synchronize()
            np.take(host, some, axis=0, out=here.numpy(), mode="clip")  # "raise" would copy `out` first
            there.copy_(here, non_blocking=True)
            if self._slots.device.type == "cuda":
                self._is_read = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._is_read.record(torch.cuda.current_stream(self._slots.device))
            ops.scatter_slots(self._slots, self._index(some), there)

    def _rounds(self, chosen: Slots) -> Iterator[tuple[Slots, torch.Tensor, torch.Tensor]]:
        here, there = self._made()
        for first in range(0, len(chosen), self._num_rows):
            some = chosen[first : first + self._num_rows]
            yield some, here[: len(some)], there[: len(some)]

    def _made(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None:
            shape, is_cuda = (self._num_rows, self._slots.shape[1]), self._slots.device.type == "cuda"
            here = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
            self._buffers = here, torch.empty(shape, dtype=torch.uint8, device=self._slots.device)
        return self._buffers

    def _index(self, chosen: Slots) -> torch.Tensor:
        return torch.from_numpy(chosen).to(self._slots.device)

    def _wait(self) -> None:
        if self._slots.device.type == "cuda":
            torch.cuda.current_stream(self._slots.device).synchronize()
