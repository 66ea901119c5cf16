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

STAGING_NBYTES: Final = 8 << 20
"""Of one buffer, per pool: at 16 GB/s half a millisecond's worth, which no launch is felt beside."""

NUM_BUFFERS: Final = 2
"""While one is on the bus, the other is filled or emptied."""


def staging_nbytes(slot_nbytes: Sequence[int]) -> int:
    """The most that both directions of pools with slots of these sizes take on a device, and again in host memory."""
    return 2 * NUM_BUFFERS * sum(_num_rows(nbytes) * nbytes for nbytes in slot_nbytes)


def _num_rows(slot_nbytes: int) -> int:
    return max(1, STAGING_NBYTES // max(1, slot_nbytes))


class _Buffer:
    """Rows in host memory and on the device, and whether what was last copied between them has arrived."""

    def __init__(self, num_rows: int, slots: torch.Tensor) -> None:
        shape, is_cuda = (num_rows, slots.shape[1]), slots.device.type == "cuda"
        self.host = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self.device = torch.empty(shape, dtype=torch.uint8, device=slots.device)
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What was queued up to here is to be waited for."""
        if self.device.device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(self.device.device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Staging:
    """Two buffers on the device of `slots` (uint8 `[num_slots, slot_nbytes]`) and two in host memory that it reaches.

    Scattered slots cost a launch and a copy, not a copy each; pinned memory is read and written at the bus's pace.
    One direction and one thread each has its own. The buffers are made when they are first needed.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        self._slots = slots
        self._num_rows = min(len(slots), _num_rows(slots.shape[1]))
        self._buffers: tuple[_Buffer, ...] = ()

    def read(self, chosen: Slots) -> Iterator[tuple[Slots, Bytes]]:
        """Some of `chosen` at a time and their bytes, good until the next. Waits for the kernels that wrote them."""
        before: tuple[Slots, _Buffer] | None = None
        for some, buffer in self._rounds(chosen):
            there = buffer.device[: len(some)]
            ops.gather_slots(self._slots, self._index(some), there)
            buffer.host[: len(some)].copy_(there, non_blocking=True)
            buffer.mark()
            if before is not None:
                yield _arrived(*before)
            before = some, buffer
        if before is not None:
            yield _arrived(*before)

    def write(self, chosen: Slots, host: Bytes) -> None:
        """Copy rows `chosen` of `host`, in order with what the current stream does next. Does not wait for the last."""
        for some, buffer in self._rounds(chosen):
            buffer.wait()
            here, there = buffer.host[: len(some)], buffer.device[: len(some)]
            np.take(host, some, axis=0, out=here.numpy(), mode="clip")  # "raise" would copy `out` first
            there.copy_(here, non_blocking=True)
            buffer.mark()
            ops.scatter_slots(self._slots, self._index(some), there)

    def _rounds(self, chosen: Slots) -> Iterator[tuple[Slots, _Buffer]]:
        if len(chosen) and not self._buffers:
            self._buffers = tuple(_Buffer(self._num_rows, self._slots) for _ in range(NUM_BUFFERS))
        for number, first in enumerate(range(0, len(chosen), self._num_rows)):
            yield chosen[first : first + self._num_rows], self._buffers[number % NUM_BUFFERS]

    def _index(self, chosen: Slots) -> torch.Tensor:
        return torch.from_numpy(chosen).to(self._slots.device)


def _arrived(some: Slots, buffer: _Buffer) -> tuple[Slots, Bytes]:
    buffer.wait()
    return some, buffer.host[: len(some)].numpy()
