"""Layouts of KV tensors that another engine allocated, read from their shapes and strides."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from disagg.transceiver.layout.strides import GroupStrides, Half, Layout
from disagg.transceiver.wire.messages.values import LayerScales

_K_AND_V = "k"


_PACKED = "D"


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
