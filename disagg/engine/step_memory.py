"""Memory that steps take on a device beside weights and pools, planned before the pools are sized.

The model's part is measured on the meta device: a forward pass of the largest step, without memory, in which the bytes
that are alive at once are counted. The rest is what the code that allocates it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch

from disagg.cache.layout import CacheLayout, LayerGroup
from disagg.cache.staging import staging_nbytes
from disagg.cache.window import live_slots_bound
from disagg.config.quantities import format_nbytes
from disagg.engine.model.hf import capturable_experts
from disagg.engine.model.load import Skeleton
from disagg.engine.model.probe import CURRENT_PROBE, AttentionCall, Probe
from disagg.engine.run.graphs.decode import batch_buckets
from disagg.engine.run.live_bytes import LiveBytes
from disagg.kernels.triton.launch import SplitSpace, cut, num_splits

PROCESSORS: Final = 160
"""Multiprocessors where no device says its own: a few more than today's largest have (148)."""

SLACK: Final = 9 / 8
"""torch hands out memory in segments of 2 and 20 MiB, and what is left of one serves no other size."""

SAMPLER_NBYTES: Final = 48
"""Per logit of the rows that a step samples: float64 values, scores and keys of them. A test measures it."""

LOGITS_NBYTES: Final = 8
"""Per logit: float32 where a step leaves them, and the copy that is sampled."""


class StepMemoryShort(Exception):
    """A device has no room for what steps take; the message says how much it is, what is free, and what to lower."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What decides how much steps take. `captures`: decode steps are graphs; `pieces`: those with prompt tokens too."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    captures: bool
    pieces: bool
    processors: int = PROCESSORS


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on the device. `total` is what the budget for KV is made smaller by."""

    activations: int = 0
    decode_graphs: int = 0
    pieces: int = 0
    workspaces: int = 0
    sampling: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def graphs(self) -> int:
        return self.decode_graphs + self.pieces

    def in_words(self) -> str:
        """`412 MiB: activations 60 MiB, decode graphs 30 MiB, ...`; parts of no bytes are left out."""
        parts = [(field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self)]
        said = ", ".join(f"{name} {format_nbytes(nbytes)}" for name, nbytes in parts if nbytes)
        return f"{format_nbytes(self.total)}: {said}" if said else format_nbytes(0)


def plan_step_memory(
    skeleton: Skeleton, layout: CacheLayout, dtype: str, limits: StepLimits, device: torch.device
) -> StepMemory:
    """What steps of at most `limits` take, of a model that computes in `dtype` (torch's name) over `layout`.

    `layout` is that of the longest sequence that the model allows. `device` decides how experts are captured; a GPU
    that is not here is asked for as `cpu`.
    """
    rows, step = limits.max_num_seqs, limits.max_num_batched_tokens
    itemsize = getattr(torch, dtype).itemsize
    largest = _Forward(skeleton.module, step, rows)
    with capturable_experts(skeleton.module, device, getattr(torch, dtype)):
        decode = _Forward(skeleton.module, batch_buckets(rows)[-1], rows) if limits.captures else None
        pieces = _Forward(skeleton.module, step, rows) if limits.pieces else None
    num_logits = rows * skeleton.vocab_size
    return StepMemory(
        # Ids and positions of eight bytes, and per group a slot, an offset and a share of a tile of four.
        activations=largest.nbytes(itemsize) + step * (16 + 16 * layout.num_groups),
        decode_graphs=decode.nbytes(itemsize) if decode else 0,
        # Beside a piece's own memory, what crosses a cut: what it reads, and what it hands to the next.
        pieces=pieces.nbytes(itemsize, num_cuts=2) if pieces else 0,
        workspaces=_workspaces(skeleton.calls, layout, itemsize, limits),
        sampling=num_logits * (SAMPLER_NBYTES + LOGITS_NBYTES * (1 + (decode is not None) + (pieces is not None))),
        staging=staging_nbytes(layout.slot_nbytes),
    )


class _Cuts(Probe):
    """The most that is alive where attention is called, its answer included: what a piece hands over."""

    def __init__(self, alive: LiveBytes) -> None:
        super().__init__()
        self._alive, self.nbytes = alive, 0

    def record(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        self.nbytes = max(self.nbytes, self._alive.live)
        return out


class _Forward:
    """A forward pass of the skeleton (bfloat16, on the meta device) over `num_tokens`, `num_rows` of them to logits."""

    def __init__(self, module: torch.nn.Module, num_tokens: int, num_rows: int) -> None:
        ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
        last = torch.zeros(num_rows, dtype=torch.int64, device="meta")
        alive = LiveBytes()
        cuts = _Cuts(alive)
        current = CURRENT_PROBE.set(cuts)
        try:
            with torch.no_grad(), alive:
                module(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=last)
        finally:
            CURRENT_PROBE.reset(current)
        self._peak, self._cut = alive.peak, cuts.nbytes

    def nbytes(self, itemsize: int, *, num_cuts: int = 0) -> int:
        """In a type of `itemsize` bytes. What is float32 in any type (norms, logits) is counted as if it were not."""
        return int((self._peak + num_cuts * self._cut) * itemsize / torch.bfloat16.itemsize * SLACK)


def _workspaces(calls: Sequence[AttentionCall], layout: CacheLayout, itemsize: int, limits: StepLimits) -> int:
    """Partial results of eager steps and of graphs, and the tables of graphs."""
    splits = max((_splits(call, itemsize, limits) for call in calls), default=0)
    tables = sum(_table(group, layout, limits) for group in layout.groups)
    return splits + (splits + tables if limits.captures else 0)


def _table(group: LayerGroup, layout: CacheLayout, limits: StepLimits) -> int:
    """What a `DecodePlan` of this group has on the device: per row its blocks and eight numbers."""
    blocks = layout.num_blocks(limits.max_model_len)
    if group.window is not None:
        blocks = min(blocks, live_slots_bound(group.window, group.num_sink_tokens, layout.block_size))
    return (limits.max_num_seqs + 3) * (8 + blocks) * torch.int32.itemsize


def _splits(call: AttentionCall, itemsize: int, limits: StepLimits) -> int:
    """The most that the parts of one layer's decode rows take, over all numbers of rows."""
    per_kv = call.num_heads // call.num_kv_heads
    keys = cut(head_dim=call.head_dim, heads_per_kv=per_kv, itemsize=itemsize, decode=True).keys
    longest = min(call.window or limits.max_model_len, limits.max_model_len)
    most = 0
    for rows in range(1, limits.max_num_seqs + 1):
        count = num_splits(
            num_programs=rows * call.num_kv_heads,
            num_keys=longest,
            chunk_keys=keys,
            num_processors=limits.processors,
        )
        if count > 1:
            most = max(most, SplitSpace(rows * call.num_heads * count, call.head_dim).num_elements)
    return most * torch.float32.itemsize
