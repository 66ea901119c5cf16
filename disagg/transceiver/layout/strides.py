"""Where KV lies, as strides: our slots and a foreign engine's tensors are described alike, and serve alike.

K (or V) of one layer is an array over (slot, head, token, dim), somewhere in a buffer, in any order of axes. A slot is
what an engine calls a block or a page. Strides and offsets count elements, as torch's do. Nothing here touches memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from disagg.transceiver.wire.messages.values import LayerScales

ELEMENT_NBYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes per element of the KV dtypes that convert into each other, by torch's names."""

FP8: Final = "float8_e4m3fn"
INT8: Final = "int8"
SCALED: Final = (FP8, INT8)
"""Those whose numbers are worth what they say times a scale."""


@dataclass(frozen=True, slots=True)
class Half:
    """K or V of one layer: element (s, h, t, d) is number `offset + s*slot + h*head + t*token + d*dim` of `buffer`."""

    buffer: int
    offset: int
    slot: int
    head: int
    token: int
    dim: int


@dataclass(frozen=True, slots=True)
class GroupStrides:
    """One layer group as one rank holds it: heads [first_head, first_head + num_heads) of these layers.

    `layers` are model layer indexes, ascending; `halves[i]` is (K, V) of `layers[i]`. `scales[i]` are its float32
    scales, K's then V's, one per held head; empty means 1.0 everywhere, the only legal value unless dtype is one
    of `SCALED`.
    """

    layers: tuple[int, ...]
    first_head: int
    num_heads: int
    head_dim: int
    num_slots: int
    dtype: str
    halves: tuple[tuple[Half, Half], ...]
    scales: tuple[LayerScales, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_NBYTES:
            raise ValueError(f"KV dtype {self.dtype!r}, expected one of {sorted(ELEMENT_NBYTES)}")
        if len(self.halves) != len(self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {self.layers} with {len(self.halves)} pairs: expected ascending, one pair each")
        if self.scales and self.dtype not in SCALED:
            raise ValueError(f"scales belong to fp8 and int8, not to {self.dtype}")
        if self.scales and any(len(half) != self.num_heads for pair in self.scales for half in pair):
            raise ValueError(f"scales: expected {self.num_heads} for K and for V of each layer")
        if self.scales and len(self.scales) != len(self.layers):
            raise ValueError(f"scales of {len(self.scales)} layers, expected {len(self.layers)}")


@dataclass(frozen=True, slots=True)
class Layout:
    """All of one rank's KV: the same number of tokens per slot in every group."""

    block_size: int
    groups: tuple[GroupStrides, ...]


class OwnGroup(Protocol):
    """What our slots are cut by: `cache.LayerGroup` has it."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def scales(self) -> tuple[LayerScales, ...]: ...


def slot_strides(group: OwnGroup, pool: int, num_slots: int, block_size: int, first_head: int = 0) -> GroupStrides:
    """One group in our slots, `[slot][layer][K,V][head][token][dim]` contiguous in buffer `pool`; its heads are those
    from `first_head` on."""
    head = block_size * group.head_dim
    half = group.num_kv_heads * head
    slot = 2 * len(group.layers) * half
    halves = tuple(
        (
            Half(pool, 2 * i * half, slot, head, group.head_dim, 1),
            Half(pool, (2 * i + 1) * half, slot, head, group.head_dim, 1),
        )
        for i in range(len(group.layers))
    )
    shape = (group.layers, first_head, group.num_kv_heads, group.head_dim, num_slots)
    return GroupStrides(*shape, group.dtype, halves, group.scales)
