"""KV between number formats: which one travels, what a conversion may change, how it is done.

The wire carries the narrower format, so that a conversion never costs bytes. fp8 (e4m3) and int8 have static scales per
(layer, K or V, KV head) that belong to a layout: stored = round(x / scale), read as stored * scale, in float32.

    fp8 bound:  |x' - x| <= max(2^-4 |x|, scale * 2^-10)    half a step of 3 mantissa bits; half a step of subnormals
    int8 bound: |x' - x| <= scale / 2                       half a step

A finite number beyond the format's range becomes its largest one and is counted; NaN and infinity stay non-finite, so
that the receiver's check still finds them.
"""

from __future__ import annotations

from typing import Final

import torch

from disagg.kernels.scales import dequantise, largest, quantise
from disagg.transceiver.layout.strides import ELEMENT_NBYTES, SCALED

FP8_RELATIVE: Final = 2.0**-4
FP8_ABSOLUTE: Final = 2.0**-10
INT8_ABSOLUTE: Final = 0.5
"""Of the scale."""

_EXACT: Final = {("bfloat16", "float32"), ("float16", "float32")}
"""Widenings that keep every value and, narrowed again, every bit of a finite one."""


def wire_dtype(sender: str, receiver: str) -> str:
    """The format that travels: the narrower, the sender's where both are equally wide (the receiver then converts)."""
    return receiver if ELEMENT_NBYTES[receiver] < ELEMENT_NBYTES[sender] else sender


def is_lossless(sender: str, receiver: str, *, same_scales: bool = True) -> bool:
    """Does every finite value arrive as it was? A lossy landing never passes for an exact block."""
    return (sender == receiver and (sender not in SCALED or same_scales)) or (sender, receiver) in _EXACT


def narrow(values: torch.Tensor, dtype: str, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """(`values` in `dtype`, how many were beyond its range). Rounds to nearest; `scales` broadcasts over `values`."""
    target: torch.dtype = getattr(torch, dtype)
    if values.dtype == target and scales is None:
        return values, 0
    exact = dequantise(values, torch.float32)
    if scales is not None:
        exact = exact / scales
    most = largest(target)
    is_finite = torch.isfinite(exact)
    num_saturated = int(((exact.abs() > most) & is_finite).sum())
    clamped = torch.where(is_finite, exact.clamp(-most, most), torch.nan)
    return quantise(clamped, target, None) if target == torch.int8 else clamped.to(target), num_saturated


def widen(values: torch.Tensor, dtype: str, scales: torch.Tensor | None = None) -> torch.Tensor:
    """`values` in `dtype`, which is at least as wide; times `scales` where they were of eight bits."""
    return dequantise(values, getattr(torch, dtype), scales)
