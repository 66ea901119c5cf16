"""How a GPU's memory is divided before anything is allocated for KV: weights are there, steps are planned, KV gets the
rest."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from disagg.cache.errors import BudgetTooSmall
from disagg.cache.layout import derive_layout
from disagg.config.quantities import format_nbytes
from disagg.config.resources import CUDA_MEMORY_FRACTION, default_kv_cache_nbytes
from disagg.config.settings import Role, WorkerSettings
from disagg.engine.model.load import LoadedModel, read_skeleton
from disagg.engine.step_memory import StepLimits, StepMemory, StepMemoryShort, plan_step_memory
from disagg.kernels.dispatch import has_triton

log = logging.getLogger(__name__)

LOWER = "lower `--max-num-seqs` or `--max-num-batched-tokens`"


def captures_graphs(settings: WorkerSettings, device: torch.device) -> bool:
    """Whether steps are captured here at all."""
    return not settings.enforce_eager and device.type == "cuda" and has_triton()


def plan_steps(settings: WorkerSettings, role: Role, model: LoadedModel, folder: Path) -> StepMemory:
    """What this worker's steps take of its GPU, also logged; nothing on a CPU, where it is no budget's part."""
    if model.device.type == "cpu":
        return StepMemory()
    captures = captures_graphs(settings, model.device)
    limits = StepLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len or model.max_position_embeddings,
        captures=captures and role != "prefill",
        pieces=captures and settings.piecewise_graphs,
        processors=torch.cuda.get_device_properties(model.device).multi_processor_count,
    )
    layout = derive_layout(model.layers, block_size=settings.block_size, max_model_len=limits.max_model_len)
    steps = plan_step_memory(read_skeleton(folder), layout, model.dtype, limits, model.device)
    log.info("steps are planned to take %s", steps.in_words())
    return steps


def kv_budget(settings: WorkerSettings, steps: StepMemory) -> int:
    """Bytes for KV: what was asked, or this worker's share of what is free and not planned for steps.

    Raises StepMemoryShort where steps and the KV that was asked for do not fit together, BudgetTooSmall where steps
    alone take the whole share.
    """
    asked = settings.kv_cache_memory
    if torch.device(settings.device).type == "cpu":
        return asked or max(1, default_kv_cache_nbytes(settings.memory_share))
    free, total = torch.cuda.mem_get_info(settings.device)
    if asked:
        if asked + steps.total > free:
            raise StepMemoryShort(
                f"`--kv-cache-memory`: {format_nbytes(asked)}, but steps take {steps.in_words()}, and "
                f"{format_nbytes(free)} of `{settings.device}` are free beside the weights; give at most "
                f"{max(0, free - steps.total)} bytes, or {LOWER}"
            )
        return asked
    share = int(max(0, free - int(total * (1 - CUDA_MEMORY_FRACTION))) * settings.memory_share)
    if share <= steps.total:
        raise BudgetTooSmall(
            f"`{settings.device}`: {format_nbytes(share)} are left for this worker beside the weights, and steps take "
            f"{steps.in_words()}: nothing is left for KV; {LOWER}, or give another device"
        )
    return share - steps.total


def capture_short(settings: WorkerSettings, steps: StepMemory) -> StepMemoryShort:
    """The sentence for a capture that ran out of memory in spite of the plan."""
    free = torch.cuda.mem_get_info(settings.device)[0] if torch.cuda.is_available() else 0
    return StepMemoryShort(
        f"CUDA graphs do not fit on `{settings.device}`: {format_nbytes(steps.graphs)} were planned for them, "
        f"{format_nbytes(free)} are free now; {LOWER} or `--kv-cache-memory`, or give `--enforce-eager`"
    )


def report_capture(nbytes: int, steps: StepMemory) -> None:
    """What graphs took beside what was planned for them; more is a warning, for the KV pools were sized by the plan."""
    level = logging.WARNING if nbytes > steps.graphs else logging.INFO
    log.log(level, "graphs took %s, planned were %s", format_nbytes(nbytes), format_nbytes(steps.graphs))


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch reports the allocator's refusals as a type of its own, and the driver's during capture in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
