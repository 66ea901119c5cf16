"""KV stored in eight bits: what a stored number is worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class KVScales:
    """float32 `[num_kv_heads]` on the pool's device: K is worth `stored * key[head]`, V `stored * value[head]`.

    `saturated`, an int64 scalar, counts numbers that were beyond what the pool's dtype holds when they were stored.
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
            limit = torch.stack([self.key, self.value])[:, :, None, None] * torch.finfo(dtype).max
            self.saturated.add_(((both.abs() > limit) & torch.isfinite(both)).sum())


def quantise(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """`x / scale` as `dtype`; `scale` broadcasts to `x`.

    To eight bits it saturates, where torch would make NaN (e4m3) or Inf (e5m2) of a finite number; what is not finite
    becomes NaN.
    """
    if scale is not None:
        x = x.float() / scale
    if dtype in EIGHT_BIT_FLOATS and x.dtype != dtype:
        x, largest = x.float(), torch.finfo(dtype).max
        x = torch.where(torch.isfinite(x), x.clamp(-largest, largest), torch.nan)
    return x.to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    """`x` as integers of its width: what is copied so keeps every bit, in dtypes that torch does not index too."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
