"""The device that a worker was told, looked at before minutes are spent on a model for it."""

from __future__ import annotations

import torch

from disagg.config.devices import CPU, NEXT_STEP, missing
from disagg.config.errors import ConfigError


def check_device(name: str) -> None:
    """Use the device once. Raises ConfigError when it is not there or cannot be used."""
    if name == CPU:
        return
    build = "cuda" if torch.version.cuda or torch.version.hip else CPU
    count = torch.cuda.device_count() if build != CPU and torch.cuda.is_available() else 0
    if reason := missing(name, count, build):
        raise ConfigError(f"`--device` is `{name}`: {reason}; {NEXT_STEP}")
    try:
        torch.zeros(1, device=name)
    except RuntimeError as exc:  # torch's report of every fault of a driver or device
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise ConfigError(f"`--device` is `{name}`, which cannot be used: {reason}; {NEXT_STEP}") from exc


def use_device(name: str) -> None:
    """Make it the calling thread's device: kernels are launched on that one, wherever their tensors lie."""
    if name != CPU:
        torch.cuda.set_device(torch.device(name).index or 0)
