"""What a reader needs to repeat a benchmark's numbers, and to judge them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys

import torch


def circumstances(*more: str, device: str = "cpu") -> str:
    """Command, commit, machine, versions, load now, and `more`, in one line."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"  # noqa: S603
    machine = f"{os.cpu_count()} cores ({cpu_name()})"
    if device.startswith("cuda"):
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    load = "load " + ", ".join(f"{value:.1f}" for value in os.getloadavg())
    command = shlex.join(["python", *sys.argv])
    return ", ".join([f"`{command}`", f"commit {commit}", machine, versions, *more, load])


def cpu_name() -> str:
    """As the kernel reports it; the architecture where it does not."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
