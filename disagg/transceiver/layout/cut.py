"""Between unequal geometries: which rank sends which layers, heads and tokens to which (protocol.md sections 1 and 6).

Everything is counted in model terms: layers and heads as positions in the model-wide layer group, tokens as ordinals
of *units*, blocks of the finer of the two block sizes. A rank's own numbers appear only where memory is touched.

    what moves   = (layers x heads of the sender's rank) meet (those of the receiver's rank), for every needed unit
    sender       = the stage that holds the layer; of ranks that hold the same heads, one per receiver, in turn
    least bytes  = sum over groups: required units x tokens per unit x layers x 2 x heads x dim x wire element

Pure; slots come in as tables (index = ordinal of that side, entry = slot or -1), as in
`disagg.transceiver.layout.block_lists`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from disagg.cache.window import Attends, needed_ordinals
from disagg.transceiver.layout.block_lists import HOLE, Table
from disagg.transceiver.layout.strides import ELEMENT_NBYTES
from disagg.transceiver.wire.messages.values import GroupSemantics

Ints = NDArray[np.int64]
Rectangle = tuple[int, int, int, int]
"""(first layer, layers, first head, heads) as positions in the model-wide group: what a manifest entry names."""


@dataclass(frozen=True, slots=True)
class ModelCut:
    """How one side cuts the model. Flat rank = stage * tensor_parallel_size + tensor rank.

    `stages`: the model layer indexes of each pipeline stage. Heads are split evenly where there are at least as many
    as tensor ranks, else each is held by tensor_parallel_size / heads consecutive ranks.
    """

    block_size: int
    dtype: str
    stages: tuple[tuple[int, ...], ...]
    tensor_parallel_size: int = 1

    @property
    def num_ranks(self) -> int:
        return len(self.stages) * self.tensor_parallel_size

    def heads(self, tensor_rank: int, num_kv_heads: int) -> range:
        """The KV heads that a tensor rank holds."""
        size = self.tensor_parallel_size
        if size >= num_kv_heads:
            first = tensor_rank * num_kv_heads // size
            return range(first, first + 1)
        share = num_kv_heads // size
        return range(tensor_rank * share, (tensor_rank + 1) * share)


@dataclass(frozen=True, slots=True)
class Copies:
    """Units of one group to copy, int64 `[n]` each, by ascending ordinal: from (slot, first token) to the same."""

    ordinals: Ints
    source_slots: Ints
    source_tokens: Ints
    slots: Ints
    tokens: Ints

    def __len__(self) -> int:
        return len(self.ordinals)


def unit_size(sender: ModelCut | int, receiver: ModelCut | int) -> int:
    """Tokens per unit: the finer block size. Raises `ValueError` unless it divides the other."""
    sizes = [side if isinstance(side, int) else side.block_size for side in (sender, receiver)]
    if min(sizes) < 1 or max(sizes) % min(sizes):
        raise ValueError(f"block sizes {sizes[0]} and {sizes[1]}: one must divide the other")
    return min(sizes)


def inconvertible_field(groups: Sequence[GroupSemantics], sender: ModelCut, receiver: ModelCut) -> str | None:
    """Name of the first field for which no plan exists, or None: these two sides can serve each other."""
    if min(sender.block_size, receiver.block_size) < 1 or _is_uneven(sender.block_size, receiver.block_size):
        return "block_size"
    if not {sender.dtype, receiver.dtype} <= ELEMENT_NBYTES.keys():
        return "kv_dtype"
    for side in (sender, receiver):
        size = side.tensor_parallel_size
        if size < 1 or any(_is_uneven(size, group.num_kv_heads) for group in groups):
            return "tensor_parallel_size"
        held = [layer for stage in side.stages for layer in stage]
        if len(set(held)) != len(held) or not set(held).issuperset(layer for group in groups for layer in group.layers):
            return "pipeline_parallel_size"
    return None


def _is_uneven(a: int, b: int) -> bool:
    return max(a, b) % min(a, b) != 0


# --- layers and heads ---------------------------------------------------------------------------------------------


def rectangle(
    group: GroupSemantics, sender: ModelCut, source_rank: int, receiver: ModelCut, rank: int
) -> Rectangle | None:
    """What one rank sends to another of a group: over all pairs of ranks, each receiver's part of it exactly once.

    Stages are runs of layers, so that two of them share one run at most. Both ranks are flat.
    """
    (from_stage, from_rank), (to_stage, to_rank) = (
        divmod(source_rank, sender.tensor_parallel_size),
        divmod(rank, receiver.tensor_parallel_size),
    )
    both = set(sender.stages[from_stage]) & set(receiver.stages[to_stage])
    places = [place for place, layer in enumerate(group.layers) if layer in both]
    copies = max(1, sender.tensor_parallel_size // group.num_kv_heads)  # ranks that hold the same heads
    held, wanted = sender.heads(from_rank, group.num_kv_heads), receiver.heads(to_rank, group.num_kv_heads)
    first, last = max(held.start, wanted.start), min(held.stop, wanted.stop)
    if not places or first >= last or (from_rank - to_rank) % copies:
        return None
    return places[0], len(places), first, last - first


# --- tokens -------------------------------------------------------------------------------------------------------


def finer(ordinals: Ints, block_size: int, unit: int) -> Ints:
    """Ordinals of blocks as ordinals of the units they consist of."""
    per_block = block_size // unit
    return (ordinals[:, None] * per_block + np.arange(per_block)).reshape(-1)


def required_ordinals(
    group: Attends, prompt_len: int, unit: int, held: Collection[int] = (), held_block_size: int = 0
) -> Ints:
    """Units of `required_g`, ascending: needed at the finer size, less what the receiver holds in blocks of its own."""
    need = needed_ordinals(prompt_len, group.window, group.num_sink_tokens, unit)
    if len(held) == 0:
        return need
    have = finer(np.fromiter(held, dtype=np.int64), held_block_size or unit, unit)
    return np.setdiff1d(need, have)


def pair_units(required: Ints, unit: int, source: tuple[Table, int], destination: tuple[Table, int]) -> Copies:
    """Where each required unit lies on both sides; each side gives (table, block size).

    A unit for which a side has no slot is left out: compare lengths where that is an error.
    """
    source_slots, source_tokens = _places(required, unit, *source)
    slots, tokens = _places(required, unit, *destination)
    both = (source_slots != HOLE) & (slots != HOLE)
    return Copies(required[both], source_slots[both], source_tokens[both], slots[both], tokens[both])


def _places(ordinals: Ints, unit: int, table: Table, block_size: int) -> tuple[Ints, Ints]:
    """(slot or -1, first token within it) of each unit."""
    blocks, tokens = np.divmod(ordinals * unit, block_size)
    padded = np.append(table, HOLE)  # an ordinal beyond the table is a hole
    return padded[np.minimum(blocks, len(table))].astype(np.int64), tokens


# --- bytes --------------------------------------------------------------------------------------------------------


def unit_nbytes(group: GroupSemantics, rectangle: Rectangle, unit: int, wire_dtype: str) -> int:
    """Bytes of one unit of a rectangle on the wire."""
    _, num_layers, _, num_heads = rectangle
    return num_layers * 2 * num_heads * unit * group.head_dim * ELEMENT_NBYTES[wire_dtype]


def minimum_nbytes(
    groups: Sequence[GroupSemantics], required: Sequence[Ints], unit: int, wire_dtype: str, *, copies: int = 1
) -> int:
    """The least that must move for these required units: every layer and head once per copy that the receiver keeps."""
    whole = [(0, len(group.layers), 0, group.num_kv_heads) for group in groups]
    return copies * sum(
        len(ordinals) * unit_nbytes(group, rectangle, unit, wire_dtype)
        for group, rectangle, ordinals in zip(groups, whole, required, strict=True)
    )


def whole_group(group: GroupSemantics) -> tuple[int, int, int, int]:
    """The rectangle (first layer, layers, first head, heads) of a unit when both geometries are equal."""
    return 0, len(group.layers), 0, group.num_kv_heads
