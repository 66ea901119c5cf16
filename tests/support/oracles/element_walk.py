"""Unequal layouts, element by element: who holds what, and what a receiver must end up with.

Walks ranks, layers, heads and tokens in plain loops. Shares no code and no formula with planner, strides or packer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

HOLE = -1


@dataclass(frozen=True)
class ModelGroup:
    window: int | None
    num_sink_tokens: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[int, ...]


@dataclass
class Cut:
    """One side: tokens per block, KV dtype, layers per stage, tensor ranks, and how one layer's tensor is shaped."""

    block_size: int
    dtype: str
    stages: tuple[tuple[int, ...], ...]
    tensor_ranks: int
    axes: str = "skhtd"


@dataclass
class Rank:
    """One rank's memory of one group: layer -> tensor (axes of the cut), and the table that the whole side shares."""

    layers: list[int]
    heads: list[int]
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)


def attends(query: int, key: int, group: ModelGroup) -> bool:
    if key > query:
        return False
    return group.window is None or key < group.num_sink_tokens or query - key < group.window


def needed_tokens(group: ModelGroup, prompt_len: int) -> set[int]:
    """Stored tokens that some query at P, P+1, ... reads."""
    horizon = (group.window or 0) + 1
    return {k for k in range(prompt_len) for q in range(prompt_len, prompt_len + horizon) if attends(q, k, group)}


def heads_of(rank: int, num_ranks: int, num_heads: int) -> list[int]:
    """Heads that a tensor rank computes: head h belongs to the ranks whose share of the interval [0, 1) meets h's."""
    return [
        h for h in range(num_heads) if h * num_ranks < (rank + 1) * num_heads and rank * num_heads < (h + 1) * num_ranks
    ]


def element(tensor: torch.Tensor, axes: str, where: dict[str, int]) -> tuple[int, ...]:
    """The index of (s, h, t, d, half) in a tensor with these axes."""
    if "D" in axes:
        dim = tensor.shape[axes.index("D")] // 2
        where = where | {"D": where["k"] * dim + where["d"]}
    return tuple(where[axis] for axis in axes)


def make_ranks(
    group: ModelGroup, cut: Cut, num_slots: int, fill: Callable[[tuple[int, ...]], torch.Tensor]
) -> list[Rank]:
    """Every rank of a side with tensors of the cut's axes; rank = stage * tensor_ranks + tensor rank."""
    ranks = []
    for stage in cut.stages:
        for rank in range(cut.tensor_ranks):
            heads = heads_of(rank, cut.tensor_ranks, group.num_kv_heads)
            held = Rank([layer for layer in group.layers if layer in stage], heads)
            extent = {"s": num_slots, "h": len(heads), "t": cut.block_size, "d": group.head_dim, "k": 2}
            extent["D"] = 2 * group.head_dim
            for layer in held.layers:
                held.tensors[layer] = fill(tuple(extent[axis] for axis in cut.axes))
            ranks.append(held)
    return ranks


def store(group: ModelGroup, cut: Cut, ranks: list[Rank], table: list[int], truth: np.ndarray) -> None:
    """Every token that the table has a slot for, written where each rank keeps it.

    `truth` is `[layer position, half, head, token, dim]`.
    """
    for held in ranks:
        for layer in held.layers:
            for token in range(truth.shape[3]):
                slot = table[token // cut.block_size]
                if slot == HOLE:
                    continue
                for position, head in enumerate(held.heads):
                    for half in (0, 1):
                        for dim in range(group.head_dim):
                            where = {"s": slot, "h": position, "t": token % cut.block_size, "d": dim, "k": half}
                            tensor = held.tensors[layer]
                            value = truth[group.layers.index(layer), half, head, token, dim]
                            tensor[element(tensor, cut.axes, where)] = float(value)


def expected(
    group: ModelGroup, cut: Cut, held: Rank, table: list[int], tokens: set[int], truth: np.ndarray, blank: float
) -> dict[int, torch.Tensor]:
    """What a receiving rank's tensors must be: these tokens of its layers and heads, `blank` everywhere else."""
    wanted = {}
    for layer in held.layers:
        tensor = torch.full_like(held.tensors[layer], blank)
        for token in tokens:
            for position, head in enumerate(held.heads):
                for half in (0, 1):
                    for dim in range(group.head_dim):
                        slot = table[token // cut.block_size]
                        where = {"s": slot, "h": position, "t": token % cut.block_size, "d": dim, "k": half}
                        value = truth[group.layers.index(layer), half, head, token, dim]
                        tensor[element(tensor, cut.axes, where)] = float(value)
        wanted[layer] = tensor
    return wanted
