"""RMS norms in the compiled helper."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import nn

from disagg.engine.model.fused_qkv import TOLERANCE, epsilon_of, gain_of, share
from disagg.kernels import native_layers

CHECKED_ROWS: Final = 3  # of random numbers: a norm of another kind differs in every one


class NativeNorm:
    """The forward of one RMS norm over the last dimension."""

    def __init__(self, gain: torch.Tensor, epsilon: float) -> None:
        self.gain, self.epsilon = gain, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return native_layers.norm(x, self.gain, self.epsilon)


@torch.inference_mode()
def suit_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if not type(module).__name__.endswith("RMSNorm") or len(parameters) != 1 or parameters[0].ndim != 1:
        return False
    width, epsilon = len(parameters[0]), epsilon_of(module)
    norm = NativeNorm(gain_of(module, torch.ones(width), epsilon).contiguous(), epsilon)
    x = random_rows(width)
    if any(share(norm.forward(scale * x), module(scale * x)) > TOLERANCE[torch.float32] for scale in (1.0, epsilon)):
        return False
    cast(Any, module).forward = norm.forward
    return True


def random_rows(width: int) -> torch.Tensor:
    """`[1, CHECKED_ROWS, width]`, always the same: what a replacement is compared on."""
    return torch.randn(1, CHECKED_ROWS, width, generator=torch.Generator().manual_seed(0))
