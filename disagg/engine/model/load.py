"""From a folder to a model that can run: its layers, what memory it takes, its weights."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from disagg.cache.host_memory import available_nbytes
from disagg.cache.layout import LayerSpec
from disagg.config.quantities import format_nbytes
from disagg.engine.model import hf
from disagg.engine.model.architecture import (
    Architecture,
    check_text_config,
    find_architecture,
    needs_dequantising,
    rope_by_layer_type,
)
from disagg.engine.model.deferred_compiler import compiler_deferred
from disagg.engine.model.fused_qkv import fuse
from disagg.engine.model.kv_dtype import (
    NO_SCALES,
    Scales,
    check_kv_dtype,
    check_scales,
    is_scale_name,
    read_scales,
    resolve_kv_dtype,
)
from disagg.engine.model.probe import AttentionCall, probe
from disagg.engine.model.weights import ModelRefused, read_config, read_tensors
from disagg.kernels.dispatch import fuses_qkv

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
GIB = 1 << 30
# Beside the weights: Python with torch and transformers, and the activations of a step.
OVERHEAD_NBYTES = GIB // 2


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model known by its configuration alone: no weights were read. `num_parameters` counts tied ones once.

    `module`: in bfloat16 on the meta device, where a forward pass takes no memory.
    """

    architecture: Architecture
    config: Any
    module: torch.nn.Module
    calls: tuple[AttentionCall, ...]
    num_parameters: int
    is_quantised: bool

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.config.max_position_embeddings)

    def layers(self, dtype: str, scales: Scales = NO_SCALES) -> tuple[LayerSpec, ...]:
        """Each attention layer as it calls attention, KV stored in `dtype`. No supported class has sink tokens."""
        return tuple(
            LayerSpec(
                index=call.layer,
                window=call.window,
                num_sink_tokens=0,
                num_kv_heads=call.num_kv_heads,
                head_dim=call.head_dim,
                dtype=dtype,
                producer=call.producer,
                scales=scales.get(call.layer),
            )
            for call in self.calls
        )

    @property
    def attention(self) -> str:
        """Signature of attention's semantics: windows, sharing, heads, scale, softcap, sink logits, RoPE per layer."""
        rope = rope_by_layer_type(self.config)
        facts = json.dumps([[asdict(call) for call in self.calls], rope], sort_keys=True, default=str)
        windows = Counter("full" if call.window is None else f"window-{call.window}" for call in self.calls)
        summary = "+".join(f"{count}x{name}" for name, count in windows.items())
        return f"{summary}:{blake2b(facts.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to run. `dtype`: torch's name of the compute dtype; `attention`: see `Skeleton.attention`.

    `saturated`: int64 scalar on the device, counts numbers that were stored as the largest of a cache of eight bits.
    """

    module: torch.nn.Module
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    device: torch.device
    attention: str
    weights_nbytes: int
    saturated: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


@compiler_deferred()  # torch's own functions for shapes without data name it too
def read_skeleton(folder: Path) -> Skeleton:
    """The model's structure from its configuration, built on the meta device. Raises ModelRefused."""
    raw = read_config(folder)
    try:
        architecture = find_architecture(raw)
        is_quantised = needs_dequantising(raw, architecture)
        config = hf.load_config(folder).get_text_config()
        check_text_config(config)
        module = hf.build_skeleton(architecture.text_class, config)
        calls = probe(module, "meta")
    except ModelRefused:
        raise
    except Exception as exc:  # what a configuration can make transformers raise has no end
        path = folder / "config.json"
        raise ModelRefused(f"`{path}` does not describe a model that can be built: {_first_line(exc)}") from exc
    _check_calls(calls)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return Skeleton(architecture, config, module, calls, num_parameters, is_quantised)


def check_model_len(asked: int, limit: int) -> None:
    """Raises ModelRefused for a `--max-model-len` beyond `limit`, the positions that the model was made for."""
    if asked > limit:
        raise ModelRefused(
            f"`--max-model-len`: {asked}, but the model was made for at most {limit} tokens; give {limit} or less"
        )


def _check_calls(calls: tuple[AttentionCall, ...]) -> None:
    for call in calls:
        if call.window is not None and call.window < 1:
            raise ModelRefused(
                f"layer {call.layer}: window {call.window}, expected at least 1, the query itself; give the window the "
                "model was trained with as `sliding_window` in config.json, or null for full attention"
            )
        if call.value_dim != call.head_dim:
            raise ModelRefused(f"layer {call.layer}: keys of {call.head_dim} and values of {call.value_dim} dimensions")
        if call.num_heads % call.num_kv_heads:
            raise ModelRefused(f"layer {call.layer}: {call.num_heads} heads over {call.num_kv_heads} KV heads")


def _first_line(error: Exception) -> str:
    """The first sentence of another library's report, with its kind: reports run to pages."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def layers_from_config(folder: Path, dtype: str = "auto") -> tuple[LayerSpec, ...]:
    """The layers `load_model` would find, without reading a weight. Raises ModelRefused."""
    skeleton = read_skeleton(folder)
    return skeleton.layers(resolve_dtype(folder, skeleton, dtype))


def resolve_dtype(folder: Path, skeleton: Skeleton, dtype: str) -> str:
    """`auto`: the configuration's dtype, or where it is silent that of most weights. Raises ModelRefused."""
    if dtype == "auto":
        configured = getattr(skeleton.config, "dtype", None) or read_config(folder).get("dtype")
        dtype = str(configured).removeprefix("torch.") if configured else _weights_dtype(folder)
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype `{dtype}` is not supported; expected auto, {', '.join(DTYPES)}")
    return dtype


def _weights_dtype(folder: Path) -> str:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    nbytes: Counter[str] = Counter()
    for tensor in read_tensors(folder):
        nbytes[names.get(tensor.dtype, tensor.dtype)] += tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "float32"


@compiler_deferred()
def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    kv_cache_dtype: str = "auto",
    kv_scales: Path | None = None,
    prefer: Callable[[str, int], str] | None = None,
) -> LoadedModel:
    """Build the model and read its weights. Raises ModelRefused: unsupported, damaged, or too large for the memory.

    `prefer`: with `dtype` auto, what to compute in, from the checkpoint's type and number of parameters.
    `kv_cache_dtype` as the flag names it; `kv_scales` is a file to read in place of the checkpoint's scales.
    The memory is compared before any weight is read; progress goes to the log.
    """
    skeleton = read_skeleton(folder)
    read_tensors(folder)  # whole files, or a sentence, before minutes are spent on them
    dtype_name = resolve_dtype(folder, skeleton, dtype)
    if dtype == "auto" and prefer is not None:
        dtype_name = prefer(dtype_name, skeleton.num_parameters)
    torch_dtype: torch.dtype = getattr(torch, dtype_name)
    kv_dtype = resolve_kv_dtype(kv_cache_dtype, dtype_name)
    check_kv_dtype(kv_dtype, torch.device(device))
    scales = read_scales(folder, kv_dtype, kv_scales, {call.layer: call.num_kv_heads for call in skeleton.calls})
    check_scales(kv_dtype, scales, [call.layer for call in skeleton.calls if call.producer == call.layer])
    nbytes = skeleton.num_parameters * torch_dtype.itemsize
    _check_memory(folder, nbytes, dtype_name, torch.device(device), skeleton.is_quantised)
    started = time.monotonic()
    module = _read_weights(folder, skeleton, torch_dtype).to(device)
    if probe(module, device) != skeleton.calls:
        raise ModelRefused(f"model `{folder}`: its layers attend differently from what config.json says")
    if fuses_qkv(torch.device(device)):
        fuse(module, skeleton.calls)
    log.info("loaded %s: %s in %s, %.1f s", folder, format_nbytes(nbytes), dtype_name, time.monotonic() - started)
    return LoadedModel(
        module=module,
        layers=skeleton.layers(kv_dtype, scales),
        vocab_size=skeleton.vocab_size,
        max_position_embeddings=skeleton.max_position_embeddings,
        dtype=dtype_name,
        device=torch.device(device),
        attention=skeleton.attention,
        weights_nbytes=nbytes,
        saturated=torch.zeros((), dtype=torch.int64, device=device),
    )


def _check_memory(folder: Path, nbytes: int, dtype: str, device: torch.device, is_quantised: bool) -> None:
    available = available_nbytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    free = f"{format_nbytes(available)} of memory available on {device}"
    sizes = f"{format_nbytes(nbytes)} of weights as {dtype}, {free}"
    if nbytes + OVERHEAD_NBYTES > available:
        raise ModelRefused(
            f"model `{folder}` does not fit: {sizes}; use a smaller model, dtype bfloat16 or more memory"
        )
    log.info("%s %s: %s", "dequantising MXFP4 model" if is_quantised else "loading", folder, sizes)


def _read_weights(folder: Path, skeleton: Skeleton, dtype: torch.dtype) -> torch.nn.Module:
    architecture = skeleton.architecture
    try:
        module, missing, unexpected = hf.load_weights(
            architecture.text_class, skeleton.config, folder, dtype, architecture.renames, skeleton.is_quantised
        )
    except Exception as exc:  # as above; memory and shapes are among its reasons
        raise ModelRefused(f"the weights in `{folder}` cannot be loaded: {_first_line(exc)}") from exc
    if missing:  # transformers would fill them with noise and say so in a warning
        raise ModelRefused(f"the weights in `{folder}` lack {len(missing)} tensors, such as `{min(missing)}`")
    surplus = sorted(n for n in unexpected if not architecture.is_expected_extra(n) and not is_scale_name(n))
    if surplus:
        log.warning("%s: %d tensors are not used, such as `%s`", folder, len(surplus), surplus[0])
    return module
