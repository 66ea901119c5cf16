"""A decode step's plan at fixed addresses, for a captured graph: filled each step, copied over in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels.batch import NULL_SLOT, TRASH_SLOT, first_blocks
from disagg.kernels.device_plan import DevicePlan
from disagg.kernels.workspace import Workspace

Int32 = npt.NDArray[np.int32]


class DecodePlan:
    """Room for `max_rows` decode queries of sequences of at most `max_tokens` tokens, in one layer group.

    A graph freezes shapes, addresses and every number that Python handed to a kernel. So tables are as wide as the
    longest sequence needs, and splits are counted for it: how much of that a row uses, the kernels read on the device.
    Rows past the sequences are padding: they store to the TRASH slot and attend to one token of the NULL slot.
    """

    def __init__(
        self,
        *,
        block_size: int,
        window: int | None,
        num_sink_tokens: int,
        max_rows: int,
        max_tokens: int,
        device: torch.device,
        workspace: Workspace,
    ) -> None:
        self._block_size, self._window, self._workspace = block_size, window, workspace
        self._num_sink_tokens = num_sink_tokens if window is not None else 0
        self._num_sink_blocks = -(-self._num_sink_tokens // block_size)
        self._longest = max_tokens if window is None else min(max_tokens, window + self._num_sink_tokens)
        width = self._width(max_tokens)
        padded = -(-max_rows // 4) * 4  # every piece begins at 16 bytes: kernels are compiled for aligned pointers
        host = torch.zeros(padded * (6 + width), dtype=torch.int32)
        # Pinned, the copy is queued and not waited for. The next `fill` finds it done: between two steps their logits
        # were read.
        self._staging = host.pin_memory() if device.type == "cuda" else host
        self._there = torch.zeros_like(host, device=device)
        self._slots, self._offsets, self._runs, self._table = (
            piece.numpy() for piece in _pieces(self._staging, padded, width)
        )
        self._device_pieces = _pieces(self._there, padded, width)
        self._head = 6 * padded
        self._lengths = np.zeros(max_rows, np.int64)  # of the rows of `_table` that are not NULL
        self._tiles = torch.tensor([[row, 0] for row in range(max_rows)], dtype=torch.int32, device=device)

    def rows(self, count: int) -> DevicePlan:
        """The plan of a graph of `count` rows: its tensors are part of the buffers, and stay where they are."""
        slots, offsets, runs, table = self._device_pieces
        return DevicePlan(
            table[:count],
            runs[:count],
            slots[:count],
            offsets[:count],
            self._tiles[:count],
            self._longest,
            self._window,
            self._num_sink_tokens,
            self._block_size,
            self._workspace,
            (),
        )

    def fill(self, tables: Sequence[Int32], positions: npt.NDArray[np.int64], count: int) -> None:
        """One row per sequence, with its query at `positions[row]`; padding up to `count` rows."""
        num_rows, size = len(tables), self._block_size
        assert num_rows <= count <= len(self._tiles)
        end = positions // size + 1
        first, sinks = first_blocks(positions, size, self._window, self._num_sink_tokens)
        lengths = sinks + end - first
        self._clear(num_rows, count, lengths)
        table = self._table[:count]
        bounds = zip(sinks.tolist(), first.tolist(), end.tolist(), strict=True)
        for row, (own, (sink, low, high)) in enumerate(zip(tables, bounds, strict=True)):
            table[row, :sink] = own[:sink]
            table[row, sink : sink + high - low] = own[low:high]
        written = table[:num_rows, : lengths.max(initial=0)]
        is_listed = np.arange(written.shape[1]) < lengths[:, None]
        assert ((written > NULL_SLOT) == is_listed).all(), "a query needs a block that has no slot"
        self._slots[:num_rows] = table[np.arange(num_rows), lengths - 1]
        self._offsets[:num_rows] = positions % size
        self._slots[num_rows:count], self._offsets[num_rows:count] = TRASH_SLOT, 0
        runs = self._runs[:count]
        runs[:, 0], runs[:, 1], runs[:, 2:] = np.arange(count), 1, 0
        runs[:num_rows, 2], runs[:num_rows, 3] = positions, (end - lengths) * size
        used = self._head + table.size
        self._there[:used].copy_(self._staging[:used], non_blocking=True)

    def _clear(self, num_rows: int, count: int, lengths: npt.NDArray[np.int64]) -> None:
        """NULL where rows were longer than they are to be: a table of all ordinals of a model is seldom used whole."""
        before = self._lengths[:count].copy()
        self._lengths[:num_rows], self._lengths[num_rows:count] = lengths, 0
        for row in np.flatnonzero(before > self._lengths[:count]).tolist():
            self._table[row, self._lengths[row] : before[row]] = NULL_SLOT

    def _width(self, max_tokens: int) -> int:
        """The most blocks that a query attends to: the sinks', and a window that begins at a block's last token."""
        blocks = -(-max_tokens // self._block_size)
        if self._window is None:
            return blocks
        return min(blocks, self._num_sink_blocks + -(-(self._window - 1) // self._block_size) + 1)


def _pieces(buffer: torch.Tensor, num_rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Slots, offsets, runs and tables. Tables come last: a small batch's rows of them end what has to be copied."""
    return (
        buffer[:num_rows],
        buffer[num_rows : 2 * num_rows],
        buffer[2 * num_rows : 6 * num_rows].view(num_rows, 4),
        buffer[6 * num_rows :].view(num_rows, width),
    )
