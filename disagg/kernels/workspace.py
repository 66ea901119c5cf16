"""Memory that kernels write between two matmuls, kept from step to step.

An allocation of megabytes is fresh pages, and the first write to a page faults: measured, gathering 4 MiB into a new
tensor takes ten times as long as into one that was written before.
"""

from __future__ import annotations

import torch


class Workspace:
    """Named buffers that grow and are never given back. One at a time may use it: its owner's steps."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def rows(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer `[count, like.shape[1]]` of unspecified contents, on `like`'s device; good until asked for again."""
        key, size = (name, like.dtype, like.device), count * like.shape[1]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(count, like.shape[1])
