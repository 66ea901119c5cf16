"""What a reader needs to repeat a measurement: the command, the code, the machine and how busy it was."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import disagg


def about(load_before: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "command": shlex.join(["disagg", *sys.argv[1:]]),
        "commit": commit(Path(disagg.__file__).parent),
        "machine": f"{_cpu_name()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(load_before[0], 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def commit(package: Path) -> str:
    """Of the checkout that this package lies in, `-dirty` with changes; the version where there is none.

    A package installed below somebody else's checkout is not of that one: only its own top level counts.
    """
    version = f"version {disagg.__version__}"
    if not (package.parent / ".git").exists():
        return version
    git = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout of another user
        return version


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
