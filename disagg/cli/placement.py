"""Which device each worker of `disagg up` computes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Final

from disagg.config import devices
from disagg.config.settings import Role, UpSettings

PREFILL_FLAG: Final = "--prefill-devices"
DECODE_FLAG: Final = "--decode-devices"


def check_told_devices(settings: UpSettings) -> None:
    """Raise ConfigError for a device that is not there, before a process is started for it."""
    for told, flag in ((settings.prefill_devices, PREFILL_FLAG), (settings.decode_devices, DECODE_FLAG)):
        devices.check_devices(told or (), flag)


class DeviceAssignment:
    """Devices by role, dealt in turn: as told, else the GPUs of this machine, else the CPU."""

    def __init__(self, settings: UpSettings) -> None:
        is_told = settings.prefill_devices is not None and settings.decode_devices is not None
        self.gpus = () if is_told else tuple(f"cuda:{number}" for number in range(devices.num_gpus() or 0))
        free = self.gpus or (devices.CPU,)
        first = settings.prefill % len(free)  # decode workers go on where prefill workers stopped
        prefill = cycle(settings.prefill_devices or free)
        decode = cycle(settings.decode_devices or (*free[first:], *free[:first]))
        self._by_role: dict[Role, Iterator[str]] = {"prefill": prefill, "decode": decode, "both": decode}

    def next_device(self, role: Role) -> str:
        return next(self._by_role[role])

    @property
    def sentence(self) -> str:
        """What to say of GPUs that were taken without being asked for; empty without any."""
        if not self.gpus:
            return ""
        found = "one GPU" if len(self.gpus) == 1 else f"{len(self.gpus)} GPUs"
        return f"{found} found, workers use {','.join(self.gpus)}: `{PREFILL_FLAG} cpu {DECODE_FLAG} cpu` for the CPU"
