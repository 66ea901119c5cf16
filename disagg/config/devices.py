"""Which GPUs torch would find here, asked without importing it: an import takes seconds, and `up` computes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from disagg.config.errors import ConfigError

CPU: Final = "cpu"
DRIVER: Final = "libcuda.so.1"
NEXT_STEP: Final = "give another device, or `cpu`"


def num_gpus() -> int | None:
    """GPUs that CUDA_VISIBLE_DEVICES leaves; 0 without a driver, None where only torch can tell (ROCm)."""
    build = torch_build()
    if build == "hip":
        return None
    return 0 if build == CPU else driver_count()


def torch_build() -> str:
    """`cuda`, `hip` or `cpu`: what the installed torch was compiled for, as its `version.py` says."""
    spec = importlib.util.find_spec("torch")
    text = ""
    for folder in (spec.submodule_search_locations or []) if spec else []:
        with contextlib.suppress(OSError):
            text += (Path(folder) / "version.py").read_text()
    built_for = re.search(r"^(cuda|hip)\b[^=\n]*= *['\"]", text, re.MULTILINE)
    return built_for[1] if built_for else CPU


def driver_count(driver: str = DRIVER) -> int:
    """What NVIDIA's driver counts. Makes no context, so it takes no memory of a GPU."""
    try:
        library = ctypes.CDLL(driver)
        count = ctypes.c_int(0)
        if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def check_devices(devices: Sequence[str], flag: str) -> None:
    """Raise ConfigError for a device that is not there."""
    wanted = [device for device in devices if device != CPU]
    if not wanted or (count := num_gpus()) is None:
        return
    for device in wanted:
        if reason := missing(device, count, torch_build()):
            raise ConfigError(f"`{flag}` is `{','.join(devices)}`: {reason}; {NEXT_STEP}")


def missing(device: str, count: int, build: str) -> str:
    """Why there is no such device; empty when there is."""
    if build == CPU:
        return "the installed PyTorch is a build for CPUs only"
    if count == 0:
        return "no GPU can be used here (`nvidia-smi` lists those of the driver)"
    if int(device.partition(":")[2] or 0) >= count:
        return f"there is no `{device}`, GPUs here are cuda:0" + (f" to cuda:{count - 1}" if count > 1 else " alone")
    return ""
