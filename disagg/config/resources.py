"""What this machine lets us use: cores and memory, seen through affinity masks and cgroup limits."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from disagg.cache.host_memory import available_nbytes

CGROUP: Final = Path("/sys/fs/cgroup")

CPU_MEMORY_FRACTION: Final = 0.25
"""Of the memory available at start, for KV on a CPU: pools are really allocated, and weights, activations, tokenizers
and whatever else runs on a laptop need the rest."""

CUDA_MEMORY_FRACTION: Final = 0.8
"""Of a GPU's memory, for weights and KV together, as in vLLM (0.9) less room for a second process's CUDA context."""


def num_cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may run on: its affinity mask, less what a cgroup v2 quota takes away."""
    affinity = len(os.sched_getaffinity(0))
    quota = _read(cgroup / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        return max(1, min(affinity, math.floor(int(quota[0]) / int(quota[1]))))
    return affinity


def default_kv_cache_nbytes(memory_share: float = 1.0) -> int:
    """The most a CPU worker takes when `--kv-cache-memory` is not given; `memory_share` is its part among siblings."""
    return int(CPU_MEMORY_FRACTION * memory_share * available_nbytes())


def threads_per_worker(num_workers: int, cores: int) -> int:
    """Torch threads of each worker that shares `cores`: more threads than cores only wait for each other."""
    return max(1, cores // num_workers)


def _read(path: Path) -> str:
    """The file's text; empty where this kernel or container has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
