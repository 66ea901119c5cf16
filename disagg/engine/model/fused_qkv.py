"""Attention modules whose packed projection goes to attention in one kernel, in place of transformers' forward.

Which modules it applies to is read from their structure, and then checked: on a few tokens the fused step must make the
Q, K and V that the module's own forward hands to attention. A module that is anything else keeps its own forward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from disagg.engine.model.attention import packed_attention
from disagg.engine.model.opaque_attention import TRACED_ATTENTION_NAME, attend_packed
from disagg.engine.model.packed_linear import NativeLinear, PackedLinear, can_pack, packed
from disagg.engine.model.probe import CURRENT_PROBE, AttentionCall, Probe
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.qkv import HeadNorms, Rotary, head_norms
from disagg.kernels.scales import KVScales
from disagg.kernels.workspace import Workspace

log = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm", "v_norm")
PARTS = frozenset({*PROJECTIONS, "o_proj", *NORMS})
# Positions of the check: the first, where RoPE turns nothing, a neighbour, and some that turn every pair of dimensions.
CHECKED_POSITIONS = (0, 1, 7, 100)
# Largest difference, as a share of the largest number: roundings of the dtype, of which transformers makes several and
# the kernel one. A norm or a rotation left out differs by a tenth and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Angles:
    """cos and sin as the kernel takes them, made once per forward pass for all layers that share them."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def of(self, embeddings: tuple[torch.Tensor, torch.Tensor], half: int) -> Rotary:
        """`embeddings`: what transformers hands to its modules, `[1, num_queries, half or 2 * half]` each."""
        found = self._known.get(embeddings[0])
        if found is None:
            cos, sin = (x[0, :, :half].float().contiguous() for x in embeddings)
            found = self._known[embeddings[0]] = Rotary(cos, sin)
        return cast(Rotary, found)


class ProjectionPart(nn.Module):
    """One projection of a packed product, for a module's own forward: what learns how it attends asks for it."""

    def __init__(self, whole: nn.Module, first: int, last: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._whole, self._first, self._last = (whole,), first, last  # in a tuple: it is no part of this module
        self.bias = bias
        self.weight = cast(torch.Tensor, whole.weight)[first:last]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._whole[0](x)[..., self._first : self._last]
        return made if self.bias is None else made + self.bias


@dataclass(eq=False, slots=True)
class FusedAttention:
    """The forward of one attention module. `half`: pairs of dimensions that RoPE turns."""

    module: nn.Module
    call: AttentionCall
    weight: torch.Tensor
    bias: torch.Tensor | None
    norms: HeadNorms | None
    angles: Angles
    half: int
    packed: NativeLinear | PackedLinear | None = None
    """On a CPU all there is of the weight, once `pack` was called."""

    def pack(self) -> None:
        """Pack the weight, where that can be done; the module's projections become parts of one product."""
        if self.packed is not None or not can_pack(self.weight.dtype):
            return
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        self.packed, first = packed(linear), 0
        self.weight = self.packed.weight
        for name in PROJECTIONS:
            own = cast(nn.Linear, getattr(self.module, name))
            setattr(self.module, name, ProjectionPart(self.packed, first, first + own.out_features, own.bias))
            first += own.out_features

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight) if self.packed is None else self.packed(hidden)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As transformers calls it: `hidden_states` `[1, num_queries, hidden]`, the same shape out."""
        module: Any = self.module
        is_traced = torch.compiler.is_compiling()
        if is_traced and module.config._attn_implementation == TRACED_ATTENTION_NAME:
            return self._traced(hidden_states[0], position_embeddings), None
        if is_traced or CURRENT_PROBE.get() is not None:  # a compiler is shown what it can compile
            own: Any = type(module).forward
            looked: tuple[torch.Tensor, None] = own(module, hidden_states, position_embeddings, *args, **options)
            return looked
        out = packed_attention(
            self.call.layer,
            self._project(hidden_states[0]),
            num_heads=self.call.num_heads,
            bias=self.bias,
            norms=self.norms,
            angles=self.angles.of(position_embeddings, self.half),
            scale=self.scale,
            window=self.call.window,
            softcap=self.call.softcap,
            sink_logits=self.sinks,
        )
        projected: torch.Tensor = module.o_proj(out.flatten(1))
        return projected[None], None

    def _traced(self, hidden: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """As a tracer sees it: the projections and the angles in the pieces, all between them one operation."""
        module: Any = self.module
        qkv = functional.linear(hidden, self.weight)
        cos, sin = (x[0, :, : self.half].float().contiguous() for x in embeddings)
        out = qkv.new_empty(qkv.shape[0], self.call.num_heads, self.call.head_dim)
        gains, normed, epsilon = None, 0, 0.0
        if self.norms is not None:
            gains, epsilon = self.norms.gains, self.norms.epsilon
            normed = sum(1 << kind for kind in range(3) if self.norms.normed[kind])
        shape = (self.call.layer, normed, epsilon, self.scale, self.call.window or 0, self.call.softcap or 0.0)
        attend_packed(qkv, cos, sin, self.bias, gains, self.sinks, module.kv_pool, out, *shape)
        projected: torch.Tensor = module.o_proj(out.flatten(1))
        return projected[None]

    @property
    def scale(self) -> float:
        return self.call.head_dim**-0.5 if self.call.scale is None else self.call.scale

    @property
    def sinks(self) -> torch.Tensor | None:
        return cast(torch.Tensor, self.module.sinks) if self.call.has_sink_logits else None

    def preprocess(
        self,
        hidden: torch.Tensor,
        embeddings: Any,
        pool: torch.Tensor,
        plan: ops.Plan,
        scales: KVScales | None = None,
    ) -> torch.Tensor:
        """Store K and V of `hidden` `[num_queries, hidden]`; Q `[num_queries, num_heads, head_dim]`."""
        return ops.preprocess_qkv(
            self._project(hidden),
            pool,
            plan,
            num_heads=self.call.num_heads,
            bias=self.bias,
            norms=self.norms,
            angles=self.angles.of(embeddings, self.half),
            scales=scales,
        )


@dataclass(slots=True)
class _Seen(Probe):
    """What one forward pass handed from and to the attention modules, by layer."""

    given: dict[int, tuple[torch.Tensor, Any]] = field(default_factory=dict)
    handed: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def record(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        self.handed[layer] = tuple(x[0].transpose(0, 1) for x in (query, key, value))
        return Probe.record(self, layer, query, key, value, *rest)


@torch.inference_mode()
def fuse(model: nn.Module, calls: Sequence[AttentionCall]) -> dict[int, str]:
    """Replace the forward of every attention module it applies to; why not, by layer, for the others.

    `calls`: what `probe` found. The q, k and v weights of a fused module become views of one packed tensor.
    """
    modules = {int(cast(Any, m.layer_idx)): m for m in model.modules() if hasattr(m, "layer_idx") and _attends(m)}
    by_layer = {call.layer: call for call in calls}
    seen, angles, refused = _look(model, modules), Angles(), {}
    for layer, call in by_layer.items():
        module = modules.get(layer)
        reason = "no module of its own" if module is None else _reason(module, call, seen)
        if any(other.producer == layer != other.layer for other in calls):
            reason = "others read its KV"  # which its own forward hands on
        if module is None or reason:
            refused[layer] = reason
            continue
        fused = _fused(module, call, seen.given[layer][1], angles)
        if (error := _error(fused, seen)) > TOLERANCE[fused.weight.dtype]:
            log.warning("layer %d: fused QKV differs from transformers' by %.1g of it: not fused", layer, error)
            refused[layer] = "other numbers"
            continue
        module.forward = fused.forward
    log.info("fused QKV preprocessing in %d of %d layers", len(by_layer) - len(refused), len(by_layer))
    return refused


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "q_proj") and hasattr(module, "o_proj")


def _look(model: nn.Module, modules: Mapping[int, nn.Module]) -> _Seen:
    """Run a few tokens through the model as it is."""
    seen = _Seen()

    def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = ("hidden_states", "position_embeddings")
        given = dict(zip(names, args, strict=False)) | options
        seen.given[int(cast(Any, module.layer_idx))] = (given["hidden_states"][0], given.get("position_embeddings"))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules.values()]
    device = next(model.parameters()).device
    positions = torch.tensor([CHECKED_POSITIONS], device=device)
    ids = torch.arange(len(CHECKED_POSITIONS), device=device)
    current = CURRENT_PROBE.set(seen)
    try:
        model(input_ids=ids[None], position_ids=positions, use_cache=False, logits_to_keep=ids[:1])
    finally:
        CURRENT_PROBE.reset(current)
        for hook in hooks:
            hook.remove()
    return seen


def _reason(module: nn.Module, call: AttentionCall, seen: _Seen) -> str:
    """Why the kernel does not do what this module does; empty when, by its structure, it does."""
    if call.producer != call.layer:
        return "reads another layer's KV"
    parts = dict(module.named_children())
    if extra := sorted(set(parts) - PARTS):
        return f"has {', '.join(extra)}"
    if any(type(parts.get(name)) is not nn.Linear for name in (*PROJECTIONS, "o_proj")):
        return "projects Q, K and V otherwise"
    if len({cast(nn.Linear, parts[name]).bias is None for name in PROJECTIONS}) > 1:
        return "has a bias on some projections"
    norms = [parts[name] for name in NORMS if name in parts]
    if any(weight.shape != (call.head_dim,) for norm in norms for weight in norm.parameters()):
        return "norms over other than a head"
    if len({epsilon_of(norm) for norm in norms}) > 1:
        return "norms by different epsilons"
    embeddings = seen.given[call.layer][1]
    if not isinstance(embeddings, tuple) or embeddings[0].shape[:2] != (1, len(CHECKED_POSITIONS)):
        return "has no RoPE"
    return ""


def _fused(
    module: nn.Module, call: AttentionCall, embeddings: tuple[torch.Tensor, ...], angles: Angles
) -> FusedAttention:
    cos, width = embeddings[0], embeddings[0].shape[-1]
    # Most families list each angle twice, for both dimensions of its pair; gpt-oss once.
    is_doubled = width % 2 == 0 and torch.equal(cos[..., : width // 2], cos[..., width // 2 :])
    bias = _packed(module, "bias") if cast(nn.Linear, module.q_proj).bias is not None else None
    return FusedAttention(
        module, call, _packed(module, "weight"), bias, _norms(module, call), angles, width // 2 if is_doubled else width
    )


def _packed(module: nn.Module, name: str) -> torch.Tensor:
    """One tensor of the three projections' parameters, which become views of it: memory is held once."""
    projections = [cast(nn.Linear, getattr(module, part)) for part in PROJECTIONS]
    parts = [cast(torch.Tensor, getattr(projection, name)) for projection in projections]
    whole = torch.cat([part.detach() for part in parts])
    for projection, view in zip(projections, torch.split(whole, [len(part) for part in parts]), strict=True):
        setattr(projection, name, nn.Parameter(view, requires_grad=False))
    return whole


def _norms(module: nn.Module, call: AttentionCall) -> HeadNorms | None:
    norms = [cast("nn.Module | None", getattr(module, name, None)) for name in NORMS]
    given = [norm for norm in norms if norm is not None]
    if not given:
        return None
    epsilon, ones = epsilon_of(given[0]), torch.ones(call.head_dim, device=cast(nn.Linear, module.q_proj).weight.device)
    query, key, value = (None if norm is None else gain_of(norm, ones, epsilon) for norm in norms)
    return head_norms(query, key, value, epsilon=epsilon)


def epsilon_of(norm: nn.Module) -> float:
    return float(cast(Any, getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))))


def gain_of(norm: nn.Module, ones: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What the norm multiplies by, as it does it: some families store their gain minus one, some norms have none."""
    gain: torch.Tensor = norm(ones).float() * (1.0 + epsilon) ** 0.5
    return gain


def _error(fused: FusedAttention, seen: _Seen) -> float:
    """Largest difference of Q, K or V from the module's own, over the largest number of each."""
    call, (hidden, embeddings) = fused.call, seen.given[fused.call.layer]
    size = len(CHECKED_POSITIONS)  # one block holds them: where a token is stored is no part of this check
    pool = torch.zeros(3, 2, call.num_kv_heads, size, call.head_dim, dtype=hidden.dtype, device=hidden.device)
    batch = PagedBatch((QueryRun(np.array([2], np.int32), 0, size),), size, None, 0)
    plan = ops.plan(batch, pool, hidden.dtype, Workspace())
    query = fused.preprocess(hidden, embeddings, pool, plan)
    made = (query, *pool[2].transpose(1, 2))
    return max(share(mine, own) for mine, own in zip(made, seen.handed[call.layer], strict=True))


def share(mine: torch.Tensor, own: torch.Tensor) -> float:
    largest = own.float().abs().max().clamp_min(1e-12)
    return float((mine.float() - own.float()).abs().max() / largest)
