"""Memory that kernels write between two matmuls, kept from step to step.

An allocation of megabytes is fresh pages, and the first write to a page faults: measured, gathering 4 MiB into a new
tensor takes ten times as long as into one that was written before.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from disagg.kernels.table_rows import TableRows


class Workspace:
    """Named buffers that grow and are never given back. One at a time may use it: its owner's steps."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._table_rows: dict[Hashable, TableRows] = {}
        self._is_frozen = False

    def table_rows(self, group: Hashable) -> TableRows:
        """Where one layer group's tables lie; good until they are placed anew."""
        return self._table_rows.setdefault(group, TableRows())

    def freeze(self) -> None:
        """From here on buffers stay where they are: captured graphs hold their addresses."""
        self._is_frozen = True

    def rows(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer `[count, like.shape[1]]` of unspecified contents, on `like`'s device; good until asked for again."""
        return self._buffer(name, count * like.shape[1], like.dtype, like.device).view(count, like.shape[1])

    def floats(self, name: str, count: int, device: torch.device) -> torch.Tensor:
        """A float32 buffer `[count]` of unspecified contents; good until asked for again."""
        return self._buffer(name, count, torch.float32, device)

    def _buffer(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            assert not self._is_frozen, f"workspace `{name}` would move: {size} elements asked after it was frozen"
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size]
