"""How much memory this process may still take, so that a pool too large is a sentence and never the OOM killer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from disagg.cache.cgroup import groups_around, groups_of_process, read, read_count

_MEMINFO = Path("/proc/meminfo")

UNLIMITED: Final = 1 << 62
"""More than any machine has. cgroup v1 writes its absent limit as a number above this, `max` is v2's word for it."""

RECLAIMABLE: Final = ("inactive_file", "active_file")
"""Page cache, which the kernel gives back before it kills: after a download it is most of what a container "uses". As
in the kernel's own MemAvailable both lists count; neither holds shared memory, which stays."""


def available_nbytes(cgroup: Path | None = None, meminfo: Path = _MEMINFO) -> int:
    """The least of what the kernel calls available and what each limit of the container leaves (Linux).

    `cgroup`: the folder of the innermost control group; without it, this process's own.
    """
    groups = groups_of_process("memory") if cgroup is None else groups_around(cgroup, "memory")
    return min([_machine_nbytes(meminfo), *map(_left_in, groups)])


def total_nbytes(cgroup: Path | None = None, meminfo: Path = _MEMINFO) -> int:
    """The machine's memory, or what the limits of the container allow of it, whatever is used now."""
    groups = groups_of_process("memory") if cgroup is None else groups_around(cgroup, "memory")
    limits = [min(_limits(group, _statistics(group / "memory.stat"))) for group in groups]
    return min([_read_meminfo(meminfo, "MemTotal"), *limits])


def _machine_nbytes(meminfo: Path) -> int:
    return _read_meminfo(meminfo, "MemAvailable")


def _read_meminfo(meminfo: Path, name: str) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024  # meminfo counts in KiB
    raise OSError(f"{meminfo}: no `{name}`; Linux 3.14 or newer is needed")


def _left_in(group: Path) -> int:
    """What one control group leaves: its limit less what is used and cannot be given back."""
    statistics = _statistics(group / "memory.stat")
    limit = min(_limits(group, statistics))
    if limit >= UNLIMITED:
        return UNLIMITED
    used = read_count(group / "memory.current") or read_count(group / "memory.usage_in_bytes") or 0
    # v1 counts a group alone, and with `total_` those inside it too, as its usage does; in v2 all counts include them
    reclaimable = sum(statistics.get(f"total_{name}", statistics.get(name, 0)) for name in RECLAIMABLE)
    return max(0, limit - max(0, used - reclaimable))


def _limits(group: Path, statistics: dict[str, int]) -> list[int]:
    """`memory.high` is no wall, but past it the kernel slows a process down until it stands still."""
    written = [read_count(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return [limit for limit in written if limit is not None] + [
        statistics.get("hierarchical_memory_limit", UNLIMITED)  # v1: the least of this group's and those around it
    ]


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isascii() and pair[1].isdigit()}
