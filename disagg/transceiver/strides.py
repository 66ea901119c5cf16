"""Where KV lies, as strides: our slots and a foreign engine's tensors are described alike, and serve alike.

K (or V) of one layer is an array over (slot, head, token, dim), somewhere in a buffer, in any order of axes. A slot is
what an engine calls a block or a page. Strides and offsets count elements, as torch's do. Nothing here touches memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from disagg.transceiver.messages.values import LayerScales

ELEMENT_NBYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes per element of the KV dtypes that convert into each other, by torch's names."""

FP8: Final = "float8_e4m3fn"
INT8: Final = "int8"
SCALED: Final = (FP8, INT8)
"""Those whose numbers are worth what they say times a scale."""

_K_AND_V = "k"
_PACKED = "D"


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


ForeignLayer = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""One tensor that holds K and V, or (K, V) apart."""


def foreign_layout(
    layers: Mapping[int, ForeignLayer],
    axes: str,
    *,
    dtype: str,
    first_head: int = 0,
    scales: tuple[LayerScales, ...] = (),
) -> Layout:
    """A layer group of a foreign engine: model layer index -> its tensors, which share `axes` and shape.

    `axes` names the axes in order: `s` slot, `h` head, `t` token, `d` dim, and for one tensor that holds both either
    `k`, an axis of two (K, V), or `D` in place of `d`, the dims of K followed by those of V. So `skthd` is FlashInfer's
    page, `kshtd` a stack of K and V, and `shtD` vLLM's `(block, head, token, 2*dim)`. Each tensor is a buffer of its
    own, numbered in the order of layers, K before V: pass `[flat(t) for t in ...]` in that order to the packer.
    """
    ordered = sorted(layers)
    cuts = []
    num_buffers = 0
    for index in ordered:
        tensors = layers[index]
        parts = tensors if isinstance(tensors, tuple) else (tensors,)
        cuts.append(_cut(parts, axes, num_buffers))
        num_buffers += len(parts)
    shapes = {extents for extents, _ in cuts}
    if len(shapes) != 1:
        raise ValueError(f"layers of one group must have one shape (slots, heads, tokens, dim), got {sorted(shapes)}")
    ((num_slots, num_heads, block_size, head_dim),) = shapes
    halves = tuple(pair for _, pair in cuts)
    group = GroupStrides(tuple(ordered), first_head, num_heads, head_dim, num_slots, dtype, halves, scales)
    return Layout(block_size, (group,))


_Extents = tuple[int, int, int, int]


def _cut(parts: tuple[torch.Tensor, ...], axes: str, first_buffer: int) -> tuple[_Extents, tuple[Half, Half]]:
    """((slots, heads, tokens, dim), (K, V)) of one layer. Raises `ValueError`."""
    if len(parts) == 2:
        (k_extents, k), (v_extents, v) = (_one(part, axes, first_buffer + i) for i, part in enumerate(parts))
        if k_extents != v_extents:
            raise ValueError(f"K and V differ in shape: {k_extents} and {v_extents}")
        return k_extents, (k, v)
    (both,) = parts
    if _PACKED in axes:
        dim = axes.index(_PACKED)
        if both.shape[dim] % 2:
            raise ValueError(f"a packed axis of {both.shape[dim]}: K and V need halves of equal size")
        extents, k = _one(both, axes.replace(_PACKED, "d"), first_buffer)
        step = extents[3] // 2 * both.stride()[dim]
        return (*extents[:3], extents[3] // 2), (k, _moved(k, step))
    if _K_AND_V not in axes:
        raise ValueError(
            f"axes {axes!r}: one tensor for K and V has an axis `k` or `D`; pass (K, V) where they are two"
        )
    axis = axes.index(_K_AND_V)
    if len(both.shape) <= axis or both.shape[axis] != 2:
        raise ValueError(f"axes {axes!r} of shape {tuple(both.shape)}: axis `k` must have two entries")
    extents, k = _one(both, axes, first_buffer)
    return extents, (k, _moved(k, both.stride()[axis]))


def _one(tensor: torch.Tensor, axes: str, buffer: int) -> tuple[_Extents, Half]:
    """Extents and strides by name. The first entry of an axis that is no index of ours is meant."""
    if sorted(axes.replace(_K_AND_V, "")) != sorted("shtd") or len(axes) != len(tensor.shape):
        raise ValueError(f"axes {axes!r} of shape {tuple(tensor.shape)}: expected each of s, h, t and d (or D) once")
    stride = dict(zip(axes, tensor.stride(), strict=True))
    extent = dict(zip(axes, map(int, tensor.shape), strict=True))
    if any(extent[axis] > 1 and stride[axis] == 0 for axis in axes):
        raise ValueError("an expanded tensor holds one element in many places and cannot be a destination")
    half = Half(buffer, int(tensor.storage_offset()), stride["s"], stride["h"], stride["t"], stride["d"])
    return (extent["s"], extent["h"], extent["t"], extent["d"]), half


def _moved(half: Half, step: int) -> Half:
    return Half(half.buffer, half.offset + step, half.slot, half.head, half.token, half.dim)
