"""`disagg plan`: what a prompt holds and moves, and how many sequences memory seats, from config.json alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from disagg.cache.budget import largest_model_len, num_seated, num_seated_by_length
from disagg.cache.errors import BudgetTooSmall
from disagg.cache.layout import CacheLayout, derive_layout
from disagg.cache.reuse_room import ReuseRoom
from disagg.config.errors import ConfigError
from disagg.config.quantities import format_nbytes
from disagg.config.settings import EngineSettings, PlanSettings
from disagg.engine.footprint import Footprint, GroupFootprint, footprint
from disagg.engine.model.checkpoint import ModelRefused, resolve_model
from disagg.engine.model.kv_dtype import resolve_kv_dtype
from disagg.engine.model.load import Skeleton, check_model_len, read_skeleton, resolve_dtype
from disagg.engine.reuse_words import CacheSize, advice, room_in_words
from disagg.engine.step_memory import StepLimits, StepMemory, plan_step_memory
from disagg.transceiver.layout.required import runs_of

COLUMNS: Final = (
    *("group", "window", "sinks", "layers", "heads x dim", "slot"),
    *("blocks to move", "moved", "full copy", "live + scratch"),
)
DEFAULT_STEP: Final[int] = EngineSettings.model_fields["max_num_batched_tokens"].default
TABLE_WIDTH: Final = 132  # the columns with long names in them: a pipe is no reason to cut figures off


@dataclass(frozen=True, slots=True)
class Seats:
    """How many sequences of `max_model_len` so many bytes of KV hold at once.

    `sequences`: by our split, with room for a step of `max_num_batched_tokens` prompt tokens; 0 leaves that room out.
    `default_sequences`: with the room that a worker keeps by default, for steps of `default_max_num_batched_tokens`.
    `reuse`: what pools for `max_num_seqs` sequences leave for prefixes; `reuse_advice`: a sentence, when it is nothing.
    `sequences_by_length`: with every layer at full length and no such room.
    """

    budget: int
    max_model_len: int
    max_num_batched_tokens: int
    sequences: int
    default_max_num_batched_tokens: int
    default_sequences: int
    sequences_by_length: int
    max_num_seqs: int
    reuse: tuple[ReuseRoom, ...]
    reuse_advice: str | None


def plan(settings: PlanSettings, *, json: bool | None) -> int:
    """Print the plan; the exit code. Raises ConfigError for what the user gave."""
    try:
        skeleton, layout, max_model_len = model_layout(settings)
        if settings.prompt_len is not None and settings.prompt_len > max_model_len:
            raise ConfigError(
                f"`--prompt-len` is `{settings.prompt_len}`: a sequence has at most {max_model_len} tokens"
            )
        found = footprint(
            layout,
            settings.prompt_len or max_model_len,
            cached_tokens=settings.cached_tokens,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            swa_scratch=settings.swa_scratch,
        )
        seats = [seats_of(layout, nbytes, max_model_len, settings) for nbytes in settings.budget]
    except BudgetTooSmall as refusal:  # the sentence of a worker that is given so little
        raise ConfigError(str(refusal).replace("--kv-cache-memory", "--budget")) from refusal
    except (ModelRefused, ValueError) as refusal:
        raise ConfigError(str(refusal)) from refusal
    steps = _steps_by_role(settings, skeleton, layout, max_model_len)
    _print_json(found, seats, steps) if json else _print_tables(found, seats, steps)
    return 0


def model_layout(settings: PlanSettings) -> tuple[Skeleton, CacheLayout, int]:
    """The model, the layout that a worker with these settings derives, and its max_model_len. Raises ModelRefused."""
    folder = resolve_model(settings.model, needs_weights=False)
    skeleton = read_skeleton(folder)
    limit = skeleton.max_position_embeddings
    max_model_len = settings.max_model_len or limit
    check_model_len(max_model_len, limit)
    layers = skeleton.layers(_kv_dtype(folder, skeleton, settings))
    uses_scratch = settings.swa_scratch != "off"
    layout = derive_layout(
        layers, block_size=settings.block_size, max_model_len=max_model_len, uses_scratch=uses_scratch
    )
    return skeleton, layout, max_model_len


def _kv_dtype(folder: Path, skeleton: Skeleton, settings: PlanSettings) -> str:
    if settings.kv_cache_dtype != "auto":
        return resolve_kv_dtype(settings.kv_cache_dtype, "")
    return _dtype(folder, skeleton, settings.dtype)


def _dtype(folder: Path, skeleton: Skeleton, dtype: str) -> str:
    try:
        return resolve_dtype(folder, skeleton, dtype)
    except ModelRefused as refusal:
        if dtype != "auto":
            raise
        raise ModelRefused(f"`{folder / 'config.json'}` names no dtype: give one with `--dtype`") from refusal


def seats_of(layout: CacheLayout, nbytes: int, max_model_len: int, settings: PlanSettings) -> Seats:
    """Raises BudgetTooSmall where a worker that is told this length would."""
    max_num_batched_tokens = settings.max_num_batched_tokens
    step = max_num_batched_tokens or DEFAULT_STEP
    size = CacheSize(
        max_model_len=max_model_len, max_num_seqs=settings.max_num_seqs, max_num_batched_tokens=step, step_tokens=step
    )
    num_slots = size.slots(layout, nbytes)
    return Seats(
        budget=nbytes,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens or 0,
        sequences=_num_seated(layout, nbytes, max_model_len, max_num_batched_tokens or 0),
        default_max_num_batched_tokens=DEFAULT_STEP,
        default_sequences=_num_seated(layout, nbytes, max_model_len, DEFAULT_STEP),
        sequences_by_length=num_seated_by_length(layout, nbytes, max_model_len=max_model_len),
        max_num_seqs=settings.max_num_seqs,
        reuse=size.room(layout, num_slots),
        reuse_advice=advice(layout, size, nbytes),
    )


def _steps_by_role(
    settings: PlanSettings, skeleton: Skeleton, layout: CacheLayout, max_model_len: int
) -> dict[str, StepMemory]:
    """What steps take of a GPU beside weights and KV, by role. The GPU is none of this machine's."""
    dtype = _dtype(resolve_model(settings.model, needs_weights=False), skeleton, settings.dtype)
    captures = not settings.enforce_eager
    return {
        role: plan_step_memory(
            skeleton,
            layout,
            dtype,
            StepLimits(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens or DEFAULT_STEP,
                max_model_len=max_model_len,
                captures=captures and role != "prefill",
                pieces=captures and settings.piecewise_graphs,
            ),
            torch.device("cpu"),
        )
        for role in ("prefill", "decode")
    }


def _num_seated(layout: CacheLayout, nbytes: int, max_model_len: int, step: int) -> int:
    """`num_seated` allows for several that prefill at once: memory for just one seats that one all the same."""
    count = num_seated(layout, nbytes, max_model_len=max_model_len, max_num_batched_tokens=step)
    return count or int(
        largest_model_len(layout, nbytes, max_model_len=max_model_len, max_num_batched_tokens=step) == max_model_len
    )


def _print_json(found: Footprint, seats: Sequence[Seats], steps: Mapping[str, StepMemory]) -> None:
    body: dict[str, Any] = found.as_json()
    body["gpu_steps"] = {role: asdict(memory) | {"total": memory.total} for role, memory in steps.items()}
    if seats:
        body["budgets"] = [asdict(one) for one in seats]
    sys.stdout.write(dumps(body) + "\n")


def _print_tables(found: Footprint, seats: Sequence[Seats], steps: Mapping[str, StepMemory]) -> None:
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = max(console.width, TABLE_WIDTH)
    table = Table(box=SIMPLE)
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for group in found.groups:
        table.add_row(*_row(group))
    console.print(table)
    console.print(
        f"{found.prompt_len} tokens in blocks of {found.block_size}: {format_nbytes(found.bytes)} move, "
        f"a full copy moves {format_nbytes(found.full_copy_bytes)}",
        soft_wrap=True,
    )
    for role, memory in steps.items():
        console.print(f"beside KV and weights, a {role} worker on a GPU takes {memory.in_words()}", soft_wrap=True)
    for one in seats:
        console.print(_seats_line(one), soft_wrap=True)
        console.print(_reuse_line(one), soft_wrap=True)


def _seats_line(seats: Seats) -> str:
    step = seats.max_num_batched_tokens
    counted = f"with room for steps of {step} prompt tokens" if step else "without room for a prefill step"
    return (
        f"{format_nbytes(seats.budget)} seats {seats.sequences} sequences of {seats.max_model_len} tokens {counted}, "
        f"{seats.default_sequences} with a worker's default steps of {seats.default_max_num_batched_tokens}; "
        f"with every layer at full length {seats.sequences_by_length}"
    )


def _reuse_line(seats: Seats) -> str:
    said = (
        f"  --max-num-seqs {seats.max_num_seqs}, for prefixes beside one running sequence: {room_in_words(seats.reuse)}"
    )
    return said if seats.reuse_advice is None else f"{said}\n  note: {seats.reuse_advice}"


def _row(group: GroupFootprint) -> tuple[str, ...]:
    return (
        group.name,
        "full" if group.window is None else str(group.window),
        str(group.sink_tokens),
        str(len(group.layers)),
        f"{group.kv_heads} x {group.head_dim} {group.dtype}",
        format_nbytes(group.slot_bytes),
        _ranges(group.required_blocks),
        format_nbytes(group.bytes),
        format_nbytes(group.full_copy_bytes),
        f"{group.live_slots} + {group.scratch_slots}",
    )


def _ranges(ordinals: Sequence[int]) -> str:
    """`0, 28-31`."""
    runs = runs_of(np.asarray(ordinals, dtype=np.int64))
    return ", ".join(str(first) if count == 1 else f"{first}-{first + count - 1}" for first, count in runs) or "none"
