"""What happens to a packed projection before attention: bias, norm and rotation, as tensors that kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rotary:
    """float32 `[num_queries, rotary_dim / 2]`: the angle of each pair of dimensions, at each query's position.

    Dimensions i and i + rotary_dim / 2 are a pair, as in all families served here; those past rotary_dim stay as they
    are. Which kind of RoPE it is (default, linear, llama3, yarn) is decided by the frequencies and the scaling alone.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __post_init__(self) -> None:
        assert self.cos.shape == self.sin.shape
        assert self.cos.dtype == self.sin.dtype == torch.float32
        assert self.cos.is_contiguous()
        assert self.sin.is_contiguous()


def rotary(positions: torch.Tensor, inverse_frequencies: torch.Tensor, scaling: float = 1.0) -> Rotary:
    """Angles = positions `[num_queries]` x frequencies `[rotary_dim / 2]`; cos and sin times `scaling` (yarn's).

    Once per step and kind of layer: all layers of a kind share it.
    """
    angles = positions.float()[:, None] * inverse_frequencies.float()[None, :]
    return Rotary(angles.cos() * scaling, angles.sin() * scaling)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm over each head: x / sqrt(mean(x^2) + epsilon) * gain.

    `gains` float32 `[3, head_dim]` for Q, K and V; `normed` says which of them are normed at all. A family that stores
    its gain minus one (Gemma) is given it whole.
    """

    gains: torch.Tensor
    normed: tuple[bool, bool, bool]
    epsilon: float

    def __post_init__(self) -> None:
        assert self.gains.ndim == 2
        assert len(self.gains) == len(self.normed)
        assert self.gains.dtype == torch.float32
        assert self.gains.is_contiguous()


def head_norms(
    query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None, *, epsilon: float
) -> HeadNorms:
    """From gains `[head_dim]`, None where there is no norm; at least one is given. Once per layer."""
    given = [gain for gain in (query, key, value) if gain is not None]
    rows = [torch.ones_like(given[0]) if gain is None else gain for gain in (query, key, value)]
    normed = (query is not None, key is not None, value is not None)
    return HeadNorms(torch.stack(rows).float().contiguous(), normed, epsilon)
