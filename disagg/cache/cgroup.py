"""The control groups that this process is in, v2 and v1: a limit of any of them, outer ones included, holds."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def groups_of_process(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> list[Path]:
    """Folders that may hold limits of `controller` (`memory`, `cpu`), without a promise that they exist.

    A container without a cgroup namespace reads the host's path in `membership` and finds its own group at the root of
    the mount, so the folders between a path and the root are always among them.
    """
    folders = []
    for line in read(membership).splitlines() or ["0::/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            folders += _upwards(root, path)
        elif controller in controllers.split(","):
            folders += _upwards(root / controllers, path) + _upwards(root / controller, path)
    return list(dict.fromkeys(folders))


def groups_around(cgroup: Path, controller: str) -> list[Path]:
    """The same for a group that is known by its folder, or by the folder under which v1 mounts its controllers."""
    return [cgroup, *cgroup.parents, cgroup / controller]


def read(path: Path) -> str:
    """The file's text; empty where this kernel or container shows no such file."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def read_count(path: Path) -> int | None:
    """The number in a file; None without one, which `max` is too."""
    text = read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _upwards(mount: Path, path: str) -> list[Path]:
    """From the group to the root of its mount. A path with `..` lies outside of what this container sees."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
