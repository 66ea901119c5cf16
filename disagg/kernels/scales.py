"""KV stored in eight bits: what a stored number is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

EIGHT_BIT_FLOATS: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BITS: Final = (*EIGHT_BIT_FLOATS, torch.int8)
INT8_NAN: Final = -128
"""The one code of int8 that no number is rounded to: what is not finite, so that reading it gives NaN again."""


@dataclass(frozen=True, slots=True)
class KVScales:
    """float32 `[num_kv_heads]` on the pool's device: K is worth `stored * key[head]`, V `stored * value[head]`.

    `saturated`, an int64 scalar there, counts numbers that were beyond what the pool's dtype holds when they were
    stored.
    """

    key: torch.Tensor
    value: torch.Tensor
    saturated: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.key.shape == self.value.shape
        assert self.key.dtype == self.value.dtype == torch.float32
        assert self.key.is_contiguous()
        assert self.value.is_contiguous()

    def count_saturated(self, both: torch.Tensor, dtype: torch.dtype) -> None:
        """`both` `[2, num_kv_heads, n, head_dim]`: K and V that are about to be stored. Waits for no device."""
        if self.saturated is not None:
            limit = torch.stack([self.key, self.value])[:, :, None, None] * largest(dtype)
            self.saturated.add_(((both.abs() > limit) & torch.isfinite(both)).sum())


def largest(dtype: torch.dtype) -> float:
    """The largest number that is stored as itself. int8 uses one code less than it has: its range is symmetric."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantise(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """`x / scale` as `dtype`; `scale` broadcasts to `x`.

    To eight bits it saturates, where torch would make NaN (e4m3) or Inf (e5m2) of a finite number, or wrap (int8);
    what is not finite becomes NaN, which int8 has as `INT8_NAN`.
    """
    if scale is not None:
        x = dequantise(x, torch.float32) / scale
    if dtype in EIGHT_BITS and x.dtype != dtype:
        x, most = dequantise(x, torch.float32), largest(dtype)
        clamped = x.clamp(-most, most)
        if dtype == torch.int8:
            return torch.where(torch.isfinite(x), clamped.round(), INT8_NAN).to(dtype)
        x = torch.where(torch.isfinite(x), clamped, torch.nan)
    return dequantise(x, dtype)


def dequantise(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What stored numbers are worth, as `dtype`, a float; `scale` broadcasts to `x`. `x` itself where nothing changes.

    Without a scale numbers of eight bits are exact in every dtype that models compute in.
    """
    if x.dtype == torch.int8 and dtype != torch.int8:
        x = torch.where(x == INT8_NAN, torch.nan, x.to(dtype if scale is None else torch.float32))
    if scale is not None:
        x = x.float() * scale
    return x.to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    """`x` as integers of its width: what is copied so keeps every bit, in dtypes that torch does not index too."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
