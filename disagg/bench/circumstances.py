"""What a reader needs to repeat a benchmark's numbers, and to judge them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import disagg


def circumstances(*more: str, device: str = "cpu") -> str:
    """Command, commit, machine, versions, load now, and `more`, in one line."""
    machine = f"{os.cpu_count()} cores ({cpu_name()})"
    if device.startswith("cuda"):
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    load = "load " + ", ".join(f"{value:.1f}" for value in os.getloadavg())
    command = shlex.join(["python", *sys.argv])
    return ", ".join([f"`{command}`", f"commit {commit()}", machine, versions, *more, load])


def about(load_before: tuple[float, float, float]) -> dict[str, Any]:
    """The same of a `disagg` command, as fields."""
    return {
        "command": shlex.join(["disagg", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(load_before[0], 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def commit(package: Path = Path(disagg.__file__).parent) -> str:
    """Of the checkout that this package lies in, `-dirty` with changes; the version where there is none.

    A package installed below another project's checkout is not part of it: only its own top level counts.
    """
    version = f"version {disagg.__version__}"
    if not (package.parent / ".git").exists():
        return version
    git = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout of another user
        return version


def cpu_name() -> str:
    """As the kernel reports it; the architecture where it does not."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
