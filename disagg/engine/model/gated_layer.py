"""Gated layers in the compiled helper: gate and what it gates in one matmul, the activation in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
from torch import nn

from disagg.engine.model.fused_qkv import TOLERANCE, share
from disagg.engine.model.native_norm import random_rows
from disagg.engine.model.packed_linear import can_pack, packed
from disagg.kernels import native_layers

GATED: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
ACTIVATIONS: Final[dict[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    native_layers.SILU: nn.functional.silu,
    native_layers.GELU_TANH: lambda x: nn.functional.gelu(x, approximate="tanh"),
}


class GatedLayer:
    """The forward of a gated layer: down(act(gate(x)) * up(x)), gate and up in one matmul. `kind`: as `gate` has it.

    `module`'s `both` is their packed weight and `down_proj` its own.
    """

    def __init__(self, module: nn.Module, kind: int) -> None:
        self.module, self.kind = module, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        rows = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = module.down_proj(native_layers.gate(module.both(rows), self.kind))
        return out.view(*x.shape[:-1], -1)


def gated_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are three plain linear layers and an activation."""
    for module in list(model.modules()):
        parts = dict(module.named_children())
        linears = [parts.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
        if set(parts) == GATED and all(type(one) is nn.Linear and one.bias is None for one in linears):
            yield module


@torch.inference_mode()
def suit_gated(module: nn.Module) -> bool:
    parts: Any = module
    kind = _activation(parts.act_fn)
    gate, up = cast(nn.Linear, parts.gate_proj), cast(nn.Linear, parts.up_proj)
    if kind is None or gate.weight.shape != up.weight.shape or not can_pack(gate.weight.dtype):
        return False
    x = random_rows(gate.in_features)
    own = module(x)
    weight = nn.Parameter(torch.cat([gate.weight, up.weight]), requires_grad=False)
    parts.both = nn.Linear(gate.in_features, 2 * gate.out_features, bias=False, device="meta")
    parts.both.weight = weight
    layer = GatedLayer(module, kind)
    if share(layer.forward(x), own) > TOLERANCE[weight.dtype]:  # it does something between these steps
        del parts.both
        return False
    parts.both = packed(parts.both)
    del parts.gate_proj, parts.up_proj
    parts.forward = layer.forward
    return True


def _activation(function: Any) -> int | None:
    """Which of the helper's activations this is, by what it makes of the numbers from -10 to 10."""
    x = torch.linspace(-10, 10, 401)
    made = function(x)
    same = (kind for kind, known in ACTIVATIONS.items() if torch.allclose(made, known(x), rtol=1e-6, atol=1e-7))
    return next(same, None)
