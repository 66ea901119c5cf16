"""A foreign engine's tensors in the place of our pools: they pass through the whole protocol as our slots do.

What the engine calls a block or page is a slot here. Units are gathered from the tensors and scattered into them by
strides, whatever the peer's memory is; they are never mapped, so a plane that reads the sender's pools serves nothing
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch

from disagg.transceiver.layout.ranks import natural_slot_nbytes, pool_of_group
from disagg.transceiver.layout.strides import GroupStrides, Half, Layout
from disagg.transceiver.memory.foreign_layout import ForeignLayer, foreign_layout
from disagg.transceiver.memory.gather import Buffer, flat
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, LayerScales


@dataclass(frozen=True, slots=True)
class ForeignPools(Sequence[PoolRegion]):
    """One pool per layer group, of which only the generations are there: `buffers` hold the bytes, as `layout` says.

    Increment a block's entry in `generations` before reusing it while a transfer may still read it. Not needed
    after the release.
    """

    layout: Layout
    buffers: tuple[Buffer, ...]
    regions: tuple[PoolRegion, ...]

    @classmethod
    def of(
        cls,
        groups: Sequence[Mapping[int, ForeignLayer]],
        axes: str,
        *,
        dtype: str,
        scales: Sequence[tuple[LayerScales, ...]] = (),
    ) -> ForeignPools:
        """`groups[g]`: model layer index -> its tensors, all of the same `axes` (`foreign_layout` names them).

        Raises `ValueError` for tensors that do not fit together.
        """
        strides: list[GroupStrides] = []
        tensors: list[torch.Tensor] = []
        layout = Layout(0, ())
        for number, layers in enumerate(groups):
            layout = foreign_layout(layers, axes, dtype=dtype, scales=scales[number] if scales else ())
            strides.append(_moved(layout.groups[0], len(tensors)))
            held = [layers[layer] for layer in sorted(layers)]
            tensors += [tensor for one in held for tensor in (one if isinstance(one, tuple) else (one,))]
        regions = tuple(
            PoolRegion(np.empty((group.num_slots, 0), dtype=np.uint8), np.ones(group.num_slots, dtype=np.uint64), -1, 0)
            for group in strides
        )
        return cls(Layout(layout.block_size, tuple(strides)), tuple(map(flat, tensors)), regions)

    @overload
    def __getitem__(self, index: int) -> PoolRegion: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[PoolRegion, ...]: ...
    def __getitem__(self, index: int | slice) -> PoolRegion | tuple[PoolRegion, ...]:
        return self.regions[index]

    def __len__(self) -> int:
        return len(self.regions)

    def geometry(self, groups: Sequence[GroupSemantics]) -> Geometry:
        """What a peer is told: `groups` in blocks of these tensors' size and format."""
        held = self.layout.groups
        scales = tuple(group.scales for group in held)
        plain = Geometry(
            self.layout.block_size, held[0].dtype, tuple(groups), (), kv_scales=scales if any(scales) else ()
        )
        return replace(plain, slot_nbytes=natural_slot_nbytes(plain))


def pool_numbers(geometry: Geometry, pools: Sequence[PoolRegion]) -> tuple[int, ...]:
    """The pool of each group."""
    return tuple(range(len(pools))) if isinstance(pools, ForeignPools) else pool_of_group(geometry)


def moves_slots(ours: Geometry, theirs: Geometry, pools: Sequence[PoolRegion]) -> bool:
    """Whether a unit is one of our slots as it lies, so that nothing is gathered or scattered here."""
    return ours == theirs and not isinstance(pools, ForeignPools)


def _moved(group: GroupStrides, first_buffer: int) -> GroupStrides:
    """`group` with its buffers numbered from `first_buffer` on."""

    def moved(half: Half) -> Half:
        return replace(half, buffer=half.buffer + first_buffer)

    return replace(group, halves=tuple((moved(k), moved(v)) for k, v in group.halves))
