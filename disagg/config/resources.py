"""What this machine lets us use: cores and memory, seen through affinity masks and cgroup limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

from disagg.cache.host_memory import available_nbytes

RoleT = TypeVar("RoleT", bound=str)

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


def threads_by_role(counts: Mapping[RoleT, int], cores: int) -> dict[RoleT, int]:
    """Torch threads of each worker, by role, where `counts` of them share `cores`.

    More threads than cores only wait for each other. What does not divide evenly goes to prefill workers: on two cores
    a second thread computes a chunk of 256 tokens 1.45 times as fast, a decode step of 32 sequences 1.2 times, and one
    of 8 not at all (the bundled model).
    """
    total = sum(counts.values())
    share = max(1, cores // total)
    prefill = sum(count for role, count in counts.items() if role == "prefill")
    more = max(0, cores - share * total) // prefill if prefill else 0
    return {role: share + more if role == "prefill" else share for role in counts}


def _read(path: Path) -> str:
    """The file's text; empty where this kernel or container has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
