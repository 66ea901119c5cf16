"""`--dtype auto` on a CPU: the checkpoint's own type, or float32 where the processor multiplies that faster.

float32 holds every number of bfloat16 and float16, so the checkpoint's range decides nothing against it; memory may.
The type follows from the processor and the machine's memory alone: workers of one machine, which must compute in one
type, choose alike however busy it is. A short measurement then says how much faster the choice is, or that it is not.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from disagg.cache.host_memory import total_nbytes
from disagg.config.quantities import format_nbytes
from disagg.engine.model.packed_linear import can_pack, packed

log = logging.getLogger(__name__)

CPUINFO: Final = Path("/proc/cpuinfo")
FULL_RATE: Final = {
    ("bfloat16", ""): "amx_bf16",
    ("bfloat16", "AuthenticAMD"): "avx512_bf16",
    ("float16", ""): "amx_fp16",
}
"""(type, vendor or "" for all) -> the CPU flag with which it multiplies at least as fast as float32. 512 rows by 768 x
2048 on one core: with avx512_bf16 of a Zen 5 bfloat16 takes half of float32's time, with that of a Xeon whose AMX is
masked 1.7 times it, and with AVX2 alone 2 to 5 times."""

MEMORY_FRACTION: Final = 0.5  # of the worker's share of the machine, for float32 weights: KV and others need the rest
ROWS, FEATURES, TURNS = 128, 512, 5  # a quarter of a millisecond a call: what a start can spare, and no cache misses
CLEARLY: Final = 1.25  # below it neighbours and clocks decide a measurement, not the type


@dataclass(frozen=True, slots=True)
class Processor:
    """`machine` as uname names it; `vendor` and `flags` as /proc/cpuinfo does."""

    machine: str
    vendor: str
    flags: frozenset[str]

    def is_full_rate(self, dtype: str) -> bool:
        """Whether `dtype` is at least as fast as float32. Unknown processors get what the checkpoint has."""
        if self.machine not in ("x86_64", "AMD64"):
            return True
        return any(FULL_RATE.get((dtype, vendor)) in self.flags for vendor in ("", self.vendor))


def this_processor(cpuinfo: Path = CPUINFO) -> Processor:
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
    first: dict[str, str] = {}
    for name, _, value in lines:
        first.setdefault(name.strip(), value.strip())
    return Processor(platform.machine(), first.get("vendor_id", ""), frozenset(first.get("flags", "").split()))


def preferred_dtype(processor: Processor, memory_nbytes: int) -> Callable[[str, int], str]:
    """What `load_model` asks: from the checkpoint's type and number of parameters to the type to compute in.

    `memory_nbytes`: the worker's share of the machine's memory.
    """

    def prefer(checkpoint: str, num_parameters: int) -> str:
        if checkpoint == "float32" or processor.is_full_rate(checkpoint):
            return checkpoint
        nbytes = num_parameters * torch.float32.itemsize
        if nbytes > MEMORY_FRACTION * memory_nbytes:
            log.info("computing in %s: float32 is faster here but takes %s", checkpoint, format_nbytes(nbytes))
            return checkpoint
        return "float32"

    return prefer


def share_of_memory(memory_share: float) -> int:
    """Bytes of this machine, or of its container, that are one worker's."""
    return int(memory_share * total_nbytes())


def say_choice(checkpoint: str, chosen: str, measure: Callable[[torch.dtype], float] | None = None) -> None:
    """Log how fast `chosen` is beside the type that was not chosen; a warning where that one is clearly faster."""
    other = checkpoint if chosen == "float32" else "float32"
    if chosen == other:
        return
    ratio = _speed(chosen, other, measure or linear_s)
    if ratio * CLEARLY < 1:
        log.warning(
            "`--dtype auto` computes in %s, but %s is %.1f times as fast here: give all workers `--dtype %s`",
            *(chosen, other, 1 / ratio, other),
        )
    else:
        log.info("computing in %s: %.1f times as fast as %s here", chosen, ratio, other)


def _speed(chosen: str, other: str, measure: Callable[[torch.dtype], float]) -> float:
    """How many times as fast `chosen` is: the best of a few turns of both."""
    pair = [getattr(torch, name) for name in (chosen, other)]
    turns = [[measure(dtype) for dtype in pair] for _ in range(TURNS)]
    best = [min(column) for column in zip(*turns, strict=True)]
    ratio: float = best[1] / best[0]
    return ratio


@torch.no_grad()
def linear_s(dtype: torch.dtype) -> float:
    """CPU seconds of this thread for one linear layer as the engine computes it."""
    linear = torch.nn.Linear(FEATURES, FEATURES, bias=False, dtype=dtype)
    module = packed(linear) if can_pack(dtype) else linear
    rows = torch.ones(ROWS, FEATURES, dtype=dtype)
    module(rows)
    began = time.thread_time()
    module(rows)
    return time.thread_time() - began
