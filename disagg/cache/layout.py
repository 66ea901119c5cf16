"""Layers -> groups -> pools: derived once from the built model, the single source of truth about where KV lies.

A *group* is a set of layers that allocate together: same (window, sinks, kv_heads, head_dim, dtype). Its slot holds
one block of all its layers as `[layer][K,V][kv_head][token][dim]`, contiguous, so a block is one region and so is a
head range of one layer. A *pool* is memory cut into equal slots; groups of equal slot bytes share one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

DTYPE_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
SCALED = ("float8_e4m3fn", "int8")
"""Bytes per element of the KV dtypes a cache can hold, by torch's names (this file imports no torch)."""

LayerScales = tuple[tuple[float, ...], tuple[float, ...]]
"""What a stored number of a layer is worth: (of K, of V), one per KV head."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer as the model was built.

    `window` counts the query itself (None = full attention); `num_sink_tokens` are always attended.
    `producer` is the layer whose KV this one reads: itself, or an earlier one (Gemma 3n and 4 share KV).
    `scales` belong to KV of eight bits; None = 1.0 everywhere.
    """

    index: int
    window: int | None
    num_sink_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    producer: int
    scales: LayerScales | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"layer {self.index}: window {self.window}, expected at least 1 (the query itself)")
        if self.num_sink_tokens < 0:
            raise ValueError(f"layer {self.index}: num_sink_tokens {self.num_sink_tokens}, expected 0 or more")
        if self.num_kv_heads < 1 or self.head_dim < 1:
            raise ValueError(f"layer {self.index}: {self.num_kv_heads} KV heads of dimension {self.head_dim}")
        if self.dtype not in DTYPE_NBYTES:
            raise ValueError(f"layer {self.index}: KV dtype `{self.dtype}`, expected one of {sorted(DTYPE_NBYTES)}")
        if self.scales is not None and self.dtype not in SCALED:
            raise ValueError(f"layer {self.index}: scales belong to fp8 and int8 KV, not to {self.dtype}")
        if self.scales is not None and any(len(half) != self.num_kv_heads for half in self.scales):
            raise ValueError(f"layer {self.index}: expected {self.num_kv_heads} scales for K and for V")

    @property
    def owns_kv(self) -> bool:
        return self.producer == self.index


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that allocate together. `layers`: model layer indexes, ascending; their rank is their place in a slot.

    `scales`: one entry per layer, or none at all where every stored number is worth what it says.
    """

    name: str
    window: int | None
    num_sink_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layers: tuple[int, ...]
    scales: tuple[LayerScales, ...] = ()

    def slot_nbytes(self, block_size: int) -> int:
        """Bytes of one block of all layers of the group: layers x (K, V) x heads x tokens x dim x element."""
        elements = len(self.layers) * 2 * self.num_kv_heads * block_size * self.head_dim
        return elements * DTYPE_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """`pool_of_group[g]`: the pool of group g; `slot_nbytes[p]`: bytes per slot of pool p; `producers`: pairs.

    `uses_scratch`: prefill keeps windowed blocks that a step outdates in scratch slots, where that is legal.
    """

    block_size: int
    groups: tuple[LayerGroup, ...]
    pool_of_group: tuple[int, ...]
    slot_nbytes: tuple[int, ...]
    producers: tuple[tuple[int, int], ...]
    uses_scratch: bool = False

    def __post_init__(self) -> None:
        assert len(self.pool_of_group) == len(self.groups)
        for group, pool in zip(self.groups, self.pool_of_group, strict=True):
            assert group.slot_nbytes(self.block_size) == self.slot_nbytes[pool]

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def num_pools(self) -> int:
        return len(self.slot_nbytes)

    def num_blocks(self, num_tokens: int) -> int:
        """Ordinals that `num_tokens` tokens touch: ceil(num_tokens / block_size)."""
        return -(-num_tokens // self.block_size)

    def scratch_pages(self, group: int) -> int:
        """Scratch blocks that one slot of the group holds: its layers; 0 where scratch is off or illegal.

        Legal: a window, and every layer whose KV another layer reads is the last of the group to write.
        """
        layers = self.groups[group].layers
        if not self.uses_scratch or self.groups[group].window is None:
            return 0
        is_overwritten = any(producer in layers[:-1] for layer, producer in self.producers if layer != producer)
        return 0 if is_overwritten else len(layers)

    def place(self, layer_index: int) -> tuple[int, int]:
        """Where a layer's KV lies: (group, position of its producer in the group). KeyError for an unknown layer."""
        producer = dict(self.producers)[layer_index]
        for number, group in enumerate(self.groups):
            if producer in group.layers:
                return number, group.layers.index(producer)
        raise KeyError(f"layer {layer_index}: its producer {producer} owns no KV")


def derive_layout(
    layers: Sequence[LayerSpec], *, block_size: int, max_model_len: int, uses_scratch: bool = False
) -> CacheLayout:
    """Group the layers that own KV, in order of first appearance, and give groups of equal slot bytes one pool.

    Windows that no sequence can leave (>= max_model_len) become full attention *before* grouping, else they would make
    spurious groups. A model without KV gives a layout with no group and no pool.
    """
    if block_size < 1:
        raise ValueError(f"block size: {block_size}, expected at least 1")
    if max_model_len < 1:
        raise ValueError(f"max model length: {max_model_len}, expected at least 1")
    _check_producers(layers)
    groups = _named(_grouped(_normalised(layer, max_model_len) for layer in layers if layer.owns_kv))
    sizes = [group.slot_nbytes(block_size) for group in groups]
    pools = tuple(dict.fromkeys(sizes))
    return CacheLayout(
        block_size=block_size,
        groups=groups,
        pool_of_group=tuple(pools.index(size) for size in sizes),
        slot_nbytes=pools,
        producers=tuple((layer.index, layer.producer) for layer in layers),
        uses_scratch=uses_scratch,
    )


def _check_producers(layers: Sequence[LayerSpec]) -> None:
    owners = {layer.index for layer in layers if layer.owns_kv}
    if len({layer.index for layer in layers}) != len(layers):
        raise ValueError("layers: an index appears twice")
    for layer in layers:
        if layer.producer not in owners:
            raise ValueError(f"layer {layer.index}: reads the KV of layer {layer.producer}, which owns none")


def _normalised(layer: LayerSpec, max_model_len: int) -> LayerSpec:
    if layer.window is None or layer.window >= max_model_len:
        return replace(layer, window=None, num_sink_tokens=0)  # full attention attends to the sinks anyway
    return layer


def _grouped(layers: Iterable[LayerSpec]) -> list[LayerGroup]:
    members: dict[tuple[int | None, int, int, int, str], list[LayerSpec]] = {}
    for layer in layers:
        key = (layer.window, layer.num_sink_tokens, layer.num_kv_heads, layer.head_dim, layer.dtype)
        members.setdefault(key, []).append(layer)
    ordered = {key: sorted(specs, key=lambda layer: layer.index) for key, specs in members.items()}
    return [
        LayerGroup("", *key, layers=tuple(layer.index for layer in specs), scales=_scales(specs))
        for key, specs in ordered.items()
    ]


def _scales(layers: Sequence[LayerSpec]) -> tuple[LayerScales, ...]:
    """Of all layers, or none: equal formats have one form, and can be compared as they stand."""
    ones = [((1.0,) * layer.num_kv_heads,) * 2 for layer in layers]
    given = [layer.scales or one for layer, one in zip(layers, ones, strict=True)]
    return () if given == ones else tuple(given)


def _named(groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """`full`, `window-64`; a second group of the same window gets `-2`, and so on."""
    seen: Counter[str] = Counter()
    named = []
    for group in groups:
        base = "full" if group.window is None else f"window-{group.window}"
        seen[base] += 1
        named.append(replace(group, name=base if seen[base] == 1 else f"{base}-{seen[base]}"))
    return tuple(named)
