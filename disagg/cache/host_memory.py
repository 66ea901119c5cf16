"""How much memory this process may still take, so that a pool too large is a sentence and never the OOM killer."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # cgroup v2 as a container sees its own limit
_MEMINFO = Path("/proc/meminfo")


def available_nbytes(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """The least of what the kernel calls available and what the container's limit leaves (Linux)."""
    return min(_machine_nbytes(meminfo), _container_nbytes(cgroup))


def _machine_nbytes(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024  # meminfo counts in KiB
    raise OSError(f"{meminfo}: no `MemAvailable`; Linux 3.14 or newer is needed")


def _container_nbytes(cgroup: Path) -> int:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (FileNotFoundError, PermissionError):  # cgroup v1, or no limit visible from here
        return 1 << 62
    return (1 << 62) if limit == "max" else max(0, int(limit) - used)
