"""Graphs on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class CudaGraph:
    """One `torch.cuda.CUDAGraph` over a pool of memory that it shares with others."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], T]) -> T:
        # What is returned stays referenced, so the pool gives its memory to no other graph; all else is reused.
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, pool=self._pool):
            return run()

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """Makes graphs that share one pool: they are replayed one after another, never at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._before = self._reserved()

    def new(self) -> CudaGraph:
        return CudaGraph(self._device, self._pool)

    @property
    def nbytes(self) -> int:
        return max(0, self._reserved() - self._before)

    def _reserved(self) -> int:
        """Bytes that torch holds once what is unused went back to the driver."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)
