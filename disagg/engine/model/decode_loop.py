"""The way through a model's layers for decode steps that are one call per layer: what transformers does around its
layers in every forward pass, masks, angles and what may be recorded of it, takes longer than a small model's layers.

Prompts, and models that do more around their layers, take transformers' own way.
"""

from __future__ import annotations

import inspect
from typing import Any, Final, cast

import torch
from torch import nn

from disagg.engine.model.attention import LayerCall
from disagg.engine.model.decoder_layer import CHECKED_START, NativeDecoder, checked_step, owner
from disagg.engine.model.fused_qkv import CHECKED_POSITIONS, TOLERANCE, share
from disagg.kernels.qkv import Rotary

PARTS: Final = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
CHECKED_ROWS: Final = 3
FIRST_POSITIONS: Final = 4096
"""Of a table of angles, which doubles when a position lies past its end: 1 MiB at a head of 64."""


class AngleTable:
    """cos and sin of every position so far, of one kind of layer: made by the model's own module, then looked up."""

    def __init__(self, module: nn.Module, kind: str | None, half: int) -> None:
        self._module, self._kind, self._half = module, kind, half
        self._cos = self._sin = torch.empty(0, half)

    def of(self, positions: torch.Tensor) -> Rotary:
        """`positions` int64 `[n]`."""
        last = int(positions.max())
        if last >= len(self._cos):
            self._grow(last + 1)
        return Rotary(self._cos.index_select(0, positions), self._sin.index_select(0, positions))

    def _grow(self, num_positions: int) -> None:
        size = max(FIRST_POSITIONS, 1 << (num_positions - 1).bit_length())
        made = self.made(torch.arange(size))
        self._cos, self._sin = made.cos, made.sin

    def made(self, positions: torch.Tensor) -> Rotary:
        """By the module."""
        kinds = () if self._kind is None else (self._kind,)
        cos, sin = self._module(torch.empty(1, 1, 1), positions[None], *kinds)
        return Rotary(*(x[0, :, : self._half].float().contiguous() for x in (cos, sin)))


class DecodeLoop:
    """The forward of a base model, whose every layer is a `NativeDecoder`'s."""

    def __init__(self, model: nn.Module, decoders: list[NativeDecoder], kinds: list[str | None]) -> None:
        self._model, self._decoders, self._kinds = model, decoders, kinds
        rotary = cast(nn.Module, model.rotary_emb)
        self.tables = {kind: AngleTable(rotary, kind, one.half) for kind, one in zip(kinds, decoders, strict=True)}
        self.output: type[Any] = object
        """What the model's own forward returns."""

    def forward(self, input_ids: torch.Tensor | None = None, **options: Any) -> Any:
        """As transformers calls it: `input_ids` `[1, n]`, `position_ids` the same."""
        positions: torch.Tensor | None = options.get("position_ids")
        calls = None if input_ids is None or positions is None else self._calls(input_ids.shape[1])
        if calls is None or input_ids is None or positions is None:
            own: Any = type(self._model).forward
            return own(self._model, input_ids, **options)
        return self.output(last_hidden_state=self._decoded(input_ids, positions[0], calls))

    def _calls(self, num_queries: int) -> list[LayerCall] | None:
        calls = []
        for decoder in self._decoders:
            if (call := decoder.call_of(num_queries)) is None:
                return None
            calls.append(call)
        return calls

    def _decoded(self, ids: torch.Tensor, positions: torch.Tensor, calls: list[LayerCall]) -> torch.Tensor:
        model: Any = self._model
        angles = {kind: table.of(positions) for kind, table in self.tables.items()}
        rows = model.embed_tokens(ids)[0]
        for decoder, kind, call in zip(self._decoders, self._kinds, calls, strict=True):
            rows = decoder.decode(rows, angles[kind], call)
        out: torch.Tensor = model.norm(rows[None])
        return out


@torch.inference_mode()
def suit_loop(model: nn.Module) -> bool:
    """Replace the forward of a causal model's layers if decode steps can take the shorter way."""
    base = cast(nn.Module, model.base_model)
    layers = list(cast("nn.ModuleList", base.layers)) if set(dict(base.named_children())) == PARTS else []
    decoders = [found for layer in layers if (found := owner(layer, NativeDecoder)) is not None]
    if not layers or len(decoders) < len(layers):
        return False
    loop = DecodeLoop(base, decoders, _kinds(base, len(layers)))
    if not _are_halves_equal(loop, decoders) or not _is_equal(loop, base):
        return False
    cast(Any, base).forward = loop.forward
    return True


def _kinds(base: Any, num_layers: int) -> list[str | None]:
    """Which of its angles each layer takes, where the model has several."""
    if "layer_type" not in inspect.signature(base.rotary_emb.forward).parameters:
        return [None] * num_layers
    return list(base.config.layer_types[:num_layers])


def _are_halves_equal(loop: DecodeLoop, decoders: list[NativeDecoder]) -> bool:
    return all(loop.tables[kind]._half == one.half for kind, one in zip(loop._kinds, decoders, strict=True))


def _is_equal(loop: DecodeLoop, base: nn.Module) -> bool:
    """Whether both ways make the same of a few tokens, and tables the module's angles."""
    ids = torch.arange(CHECKED_ROWS)[None] + 3
    options = {"position_ids": torch.full_like(ids, CHECKED_START), "use_cache": False}
    with checked_step(loop._decoders, CHECKED_ROWS):
        own = base(input_ids=ids, **options)
        loop.output = type(own)
        made = loop.forward(input_ids=ids, **options)
    positions = torch.tensor(CHECKED_POSITIONS)
    angles = [(table.of(positions), table.made(positions)) for table in loop.tables.values()]
    is_turned = all(torch.equal(a.cos, b.cos) and torch.equal(a.sin, b.sin) for a, b in angles)
    return is_turned and share(made.last_hidden_state, own.last_hidden_state) <= TOLERANCE[torch.float32]
