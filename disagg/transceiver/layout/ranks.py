"""One rank of a worker: what it holds of the model, what moves between two ranks, and how its slots are cut.

A worker of tensor_parallel_size x stages ranks cuts the model-wide layer groups by heads and layers
(`disagg.transceiver.layout.cut.ModelCut`). Each rank is a transceiver of its own, with its own pools and incarnation;
workers of one rank are the simplest case. Of ranks that hold the same heads, each serves some receivers, in turn. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from disagg.transceiver.layout.cut import ModelCut, Rectangle, rectangle, whole_group
from disagg.transceiver.layout.required import needed_units
from disagg.transceiver.layout.strides import ELEMENT_NBYTES, Layout, slot_strides
from disagg.transceiver.wire.messages.values import Geometry, GroupRuns, GroupSemantics, LayerScales

MAX_RANKS = 4096
"""Per worker; far above any that exists, and small enough that a peer's claim costs nothing to look at."""


@dataclass(frozen=True, slots=True)
class HeldGroup:
    """A rank's part of one layer group: `num_kv_heads` heads from `first_head` on, of `layers` (none: no part)."""

    first_head: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layers: tuple[int, ...]
    scales: tuple[LayerScales, ...]

    def slot_nbytes(self, block_size: int) -> int:
        elements = len(self.layers) * 2 * self.num_kv_heads * block_size * self.head_dim
        return elements * ELEMENT_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """What one prefill rank sends to one decode rank: `rectangles[g]` of group g, None where nothing moves.

    `rank` of `num_ranks` ranks of the prefill worker; rank 0 sends the first token too.
    """

    rank: int
    num_ranks: int
    rectangles: tuple[Rectangle | None, ...]
    is_joined: bool = True
    """Whether a leader of several ranks decides, once it has all their parts."""

    @classmethod
    def whole(cls, groups: Sequence[GroupSemantics]) -> Part:
        """Between workers of one rank each."""
        return cls(0, 1, tuple(whole_group(group) for group in groups), is_joined=False)

    @classmethod
    def between(cls, sender: Geometry, receiver: Geometry) -> Part:
        num_ranks = sender.tensor_parallel_size * sender.pipeline_parallel_size
        return cls(sender.rank, num_ranks, rectangles(sender, receiver))

    def needed(self, groups: Sequence[GroupSemantics], prompt_len: int, unit: int) -> tuple[GroupRuns, ...]:
        """`need_g` of the groups of which this part has something."""
        every = needed_units(groups, prompt_len, unit)
        return tuple(
            entry if rectangle else GroupRuns(entry.group, ())
            for entry, rectangle in zip(every, self.rectangles, strict=True)
        )


def side_of(geometry: Geometry) -> ModelCut:
    """How a worker cuts the model."""
    every = tuple(sorted(layer for group in geometry.groups for layer in group.layers))
    stages = geometry.stages or (every,)
    return ModelCut(geometry.block_size, geometry.kv_dtype, stages, geometry.tensor_parallel_size)


def held_groups(geometry: Geometry) -> tuple[HeldGroup, ...]:
    """What this rank holds of each group."""
    stage, tensor_rank = divmod(geometry.rank, geometry.tensor_parallel_size)
    side = side_of(geometry)
    found = []
    for number, group in enumerate(geometry.groups):
        heads = side.heads(tensor_rank, group.num_kv_heads)
        places = [place for place, layer in enumerate(group.layers) if layer in side.stages[stage]]
        given = geometry.kv_scales[number] if geometry.kv_scales else ()
        scales = tuple(
            (given[place][0][heads.start : heads.stop], given[place][1][heads.start : heads.stop])
            for place in (places if given else ())
        )
        layers = tuple(group.layers[place] for place in places)
        found.append(HeldGroup(heads.start, len(heads), group.head_dim, geometry.kv_dtype, layers, scales))
    return tuple(found)


def pool_of_group(geometry: Geometry) -> tuple[int, ...]:
    """The pool of each group on this rank, -1 for a group of which it holds nothing."""
    sizes = [held.slot_nbytes(geometry.block_size) for held in held_groups(geometry)]
    return tuple(geometry.slot_nbytes.index(size) if size else -1 for size in sizes)


def natural_slot_nbytes(geometry: Geometry) -> tuple[int, ...]:
    """Slot bytes per pool as this rank's part makes them; groups of equal slots share a pool."""
    sizes = (held.slot_nbytes(geometry.block_size) for held in held_groups(geometry))
    return tuple(dict.fromkeys(size for size in sizes if size))


def rank_geometry(
    geometry: Geometry, rank: int, *, tensor_parallel_size: int = 1, stages: Sequence[Sequence[int]] = ()
) -> Geometry:
    """Of a worker that holds all of the model, the geometry of one rank if it were cut like this."""
    cut = replace(
        geometry,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=len(stages) or 1,
        stages=tuple(map(tuple, stages)),
        rank=rank,
    )
    return replace(cut, slot_nbytes=natural_slot_nbytes(cut))


def rank_layout(geometry: Geometry, num_slots: Sequence[int]) -> Layout:
    """This rank's pools as strides, buffer p = pool p of `num_slots[p]` slots; group g is the model's group g."""
    return Layout(
        geometry.block_size,
        tuple(
            slot_strides(held, pool, num_slots[pool] if pool >= 0 else 0, geometry.block_size, held.first_head)
            for held, pool in zip(held_groups(geometry), pool_of_group(geometry), strict=True)
        ),
    )


def rectangles(sender: Geometry, receiver: Geometry) -> tuple[Rectangle | None, ...]:
    """Per group, what moves from this sending to this receiving rank; None where nothing does."""
    ours, theirs = side_of(sender), side_of(receiver)
    return tuple(rectangle(group, ours, sender.rank, theirs, receiver.rank) for group in receiver.groups)


def senders_of(receiver: Geometry, senders: Sequence[Geometry]) -> tuple[int, ...]:
    """Which ranks of a prefill worker a decode rank fetches from: those that own something, and the leader, rank 0."""
    return tuple(number for number, one in enumerate(senders) if one.rank == 0 or any(rectangles(one, receiver)))


def is_contiguous(geometry: Geometry) -> bool:
    """Do a stage's layers follow each other in the model? Then two ranks share at most one rectangle of a group."""
    every = sorted(layer for group in geometry.groups for layer in group.layers)
    place = {layer: number for number, layer in reversed(list(enumerate(every)))}  # the first, should one come twice
    held = [place[layer] for stage in side_of(geometry).stages for layer in stage if layer in place]
    return held == sorted(held)
