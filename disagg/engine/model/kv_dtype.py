"""What the paged cache stores: the KV dtype, and what a stored number of eight bits is worth.

fp8 (e4m3) and int8 have static scales per (layer, K or V, KV head): stored = round(x / scale), read as stored * scale.
They come from a file of the operator, else from the checkpoint, else they are 1.0; int8, whose steps are all alike,
says nothing without them and asks for them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from disagg.cache.layout import LayerScales, LayerSpec
from disagg.engine.model.weights import ModelRefused, TensorEntry, read_tensors
from disagg.kernels.dispatch import backend
from disagg.kernels.scales import KVScales, largest

FP8: Final = "float8_e4m3fn"
INT8: Final = "int8"
SCALED: Final = (FP8, INT8)
TORCH_NAMES: Final[Mapping[str, str]] = MappingProxyType({"fp8_e4m3": FP8})

FP8_CAPABILITY: Final = (8, 9)
"""Ada: Triton compiles conversions to e4m3 from here on."""

Scales = Mapping[int, LayerScales]
"""By layer index; a layer without an entry has 1.0 everywhere."""
NO_SCALES: Final[Scales] = MappingProxyType({})

# As ModelOpt, AutoFP8, compressed-tensors and Quark name them.
_SCALE_NAME: Final = re.compile(
    r"(?:model\.|language_model\.)*layers\.(\d+)\.self_attn\.(?:attn\.)?"
    r"(?:([kv])_scale|([kv])_proj\.(?:[kv]_scale|output_scale))"
)
_SCALE_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def resolve_kv_dtype(kv_cache_dtype: str, compute_dtype: str) -> str:
    """torch's name of what `--kv-cache-dtype` says; `auto` is the compute dtype."""
    return compute_dtype if kv_cache_dtype == "auto" else TORCH_NAMES.get(kv_cache_dtype, kv_cache_dtype)


def check_kv_dtype(kv_dtype: str, device: torch.device) -> None:
    """Raise ModelRefused where kernels cannot be compiled for numbers that the device does not have."""
    if kv_dtype != FP8 or device.type != "cuda" or backend(device).NAME != "triton":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        raise ModelRefused(
            f"`--kv-cache-dtype fp8`: {device} is of compute capability {major}.{minor}, which has no fp8 numbers "
            f"(8.9 and later have); use `int8` with `--kv-scales`, or `auto`"
        )


def read_scales(folder: Path, kv_dtype: str, file: Path | None, num_kv_heads: Mapping[int, int]) -> Scales:
    """Scales of a model's layers, `num_kv_heads` by index: from `file`, else the checkpoint. Raises ModelRefused."""
    if kv_dtype not in SCALED and file is not None:
        told = f"only fp8 and int8 KV have scales and this cache's is {kv_dtype}"
        raise ModelRefused(f"`--kv-scales`: {told}; drop one of the two")
    if kv_dtype not in SCALED:
        return NO_SCALES
    if file is not None:
        return _from_file(file, num_kv_heads)
    scales = _from_checkpoint(folder, num_kv_heads)
    return scales if kv_dtype == FP8 else _for_int8(scales)


def check_scales(kv_dtype: str, scales: Scales, owners: Iterable[int]) -> None:
    """Raise ModelRefused for an int8 cache that lacks scales of a layer, of those that own KV (`owners`)."""
    missing = [layer for layer in owners if layer not in scales]
    if kv_dtype == INT8 and missing:
        raise ModelRefused(
            f"`--kv-cache-dtype int8`: neither `--kv-scales` nor the checkpoint has scales of layer {missing[0]}; "
            f"give a file with one for each layer (the largest number of K, and of V, over 127)"
        )


def _for_int8(scales: Scales) -> Scales:
    """A checkpoint's scales are fp8's: the same range in 127 steps."""
    factor = largest(torch.float8_e4m3fn) / largest(torch.int8)
    return {layer: (_times(key, factor), _times(value, factor)) for layer, (key, value) in scales.items()}


def _times(heads: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return _heads([scale * factor for scale in heads], len(heads))


def is_scale_name(name: str) -> bool:
    """Whether a checkpoint's tensor is a scale of its KV."""
    return _SCALE_NAME.fullmatch(name) is not None


def kernel_scales(layers: Iterable[LayerSpec], saturated: torch.Tensor) -> dict[int, KVScales]:
    """Scales by which each layer of an eight-bit cache reads and writes; one that shares KV has its producer's.

    `saturated`, on the model's device, counts for all of them.
    """
    specs = {layer.index: layer for layer in layers}
    found = {}
    for layer in specs.values():
        owner = specs[layer.producer]
        if owner.dtype in SCALED:
            scales = owner.scales or ((1.0,) * owner.num_kv_heads,) * 2
            key, value = (torch.tensor(half, dtype=torch.float32, device=saturated.device) for half in scales)
            found[layer.index] = KVScales(key, value, saturated)
    return found


def _from_file(file: Path, num_kv_heads: Mapping[int, int]) -> Scales:
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelRefused(f"`--kv-scales`: `{file}` cannot be read as JSON: {exc}") from exc
    try:
        return {int(layer): _pair(entry, num_kv_heads[int(layer)]) for layer, entry in given.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ModelRefused(
            f'`--kv-scales`: `{file}`: expected `{{"0": {{"k": 0.5, "v": [0.5, 0.25]}}, ...}}`, one positive '
            f"number per layer or per KV head of it, for layers of this model ({type(exc).__name__}: {exc})"
        ) from exc


def _pair(entry: Mapping[str, Any], num_heads: int) -> LayerScales:
    if set(entry) != {"k", "v"}:
        raise ValueError(f"keys {sorted(entry)}")
    return _heads(entry["k"], num_heads), _heads(entry["v"], num_heads)


def _heads(value: Any, num_heads: int) -> tuple[float, ...]:
    """One scale per head, as float32 holds it: what both ends of a transfer compare."""
    given = torch.tensor(value, dtype=torch.float32).reshape(-1).tolist()
    heads = tuple(given) * (num_heads if len(given) == 1 else 1)
    if len(heads) != num_heads:
        raise ValueError(f"{len(heads)} scales for {num_heads} KV heads")
    if not all(math.isfinite(scale) and scale > 0 for scale in heads):
        raise ValueError(f"scales {heads}, expected positive numbers")
    return heads


def _from_checkpoint(folder: Path, num_kv_heads: Mapping[int, int]) -> Scales:
    halves: dict[int, dict[str, tuple[float, ...]]] = {}
    for entry in read_tensors(folder):
        match = _SCALE_NAME.fullmatch(entry.name)
        if match is None or int(match[1]) not in num_kv_heads:
            continue
        layer, half = int(match[1]), match[2] or match[3]
        try:
            halves.setdefault(layer, {})[half] = _heads(_values(entry), num_kv_heads[layer])
        except (KeyError, ValueError) as exc:
            raise ModelRefused(f"`{entry.path}`: `{entry.name}` is no usable KV scale: {exc}") from exc
    ones = {layer: (1.0,) * count for layer, count in num_kv_heads.items()}
    return {layer: (found.get("k", ones[layer]), found.get("v", ones[layer])) for layer, found in halves.items()}


def _values(entry: TensorEntry) -> list[float]:
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        data = bytearray(file.read(entry.nbytes))
    values: list[float] = torch.frombuffer(data, dtype=_SCALE_DTYPES[entry.dtype]).tolist()
    return values
