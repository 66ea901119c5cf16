"""What this machine lets us use: cores and memory, seen through affinity masks and cgroup limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

from disagg.cache.cgroup import groups_around, groups_of_process, read, read_count
from disagg.cache.host_memory import available_nbytes

RoleT = TypeVar("RoleT", bound=str)

CPU_MEMORY_FRACTION: Final = 0.25
"""Of the memory available at start, for KV on a CPU: pools are really allocated, and weights, activations, tokenizers
and whatever else runs on a laptop need the rest."""

CUDA_MEMORY_FRACTION: Final = 0.8
"""Of a GPU's memory, for weights and KV together, as in vLLM (0.9) less room for a second process's CUDA context."""


def num_cores(cgroup: Path | None = None) -> int:
    """Cores this process may run on: its affinity mask, less what the quota of a control group takes away.

    `cgroup`: the folder of the innermost control group; without it, this process's own.
    """
    groups = groups_of_process("cpu") if cgroup is None else groups_around(cgroup, "cpu")
    quotas = [quota for group in groups if (quota := _quota(group)) is not None]
    return min([len(os.sched_getaffinity(0)), *(max(1, math.floor(quota)) for quota in quotas)])


def _quota(group: Path) -> float | None:
    """Cores that one control group may use, v2 or v1; None without a limit, which v1 writes as -1."""
    words = read(group / "cpu.max").split()
    if len(words) == 2 and all(word.isascii() and word.isdigit() for word in words) and int(words[1]):
        return int(words[0]) / int(words[1])
    quota, period = read_count(group / "cpu.cfs_quota_us"), read_count(group / "cpu.cfs_period_us")
    return quota / period if quota is not None and period else None


def num_api_processes(told: int | None, cores: int) -> int:
    """Processes that a router starts for its API; 0 = its own does it, which small machines have no cores to spare for.

    A quarter of the cores keeps the most for workers; past 8, one router's core is what limits.
    """
    if told is not None:
        return told
    return 0 if cores <= 4 else min(8, cores // 4)


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
