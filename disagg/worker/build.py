"""From settings to an engine: model, layout, pools. What takes seconds or can be refused, before any loop runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from disagg.cache.budget import largest_model_len
from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, derive_layout
from disagg.config.quantities import format_nbytes
from disagg.config.resources import num_cores
from disagg.config.settings import Role, WorkerSettings
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model import cpu_dtype
from disagg.engine.model.checkpoint import fingerprint, resolve_model
from disagg.engine.model.cpu_layers import suit_cpu
from disagg.engine.model.load import LoadedModel, check_model_len, load_model
from disagg.engine.reuse_words import CacheSize, advice, room_in_words
from disagg.engine.run.graphs.cuda import CudaGraphs
from disagg.engine.run.graphs.decode import DecodeGraphs, GraphMaker, GraphRunner
from disagg.engine.run.graphs.use import GraphUse
from disagg.engine.run.runner import Runner, StepRunner
from disagg.engine.run.warmup import warm_up
from disagg.engine.step_memory import StepMemory
from disagg.kernels.dispatch import backend
from disagg.transceiver.wire.codec import PROTOCOL
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import Identity
from disagg.worker.device import check_device, use_device
from disagg.worker.device_memory import (
    capture_short,
    captures_graphs,
    is_out_of_memory,
    kv_budget,
    plan_steps,
    report_capture,
)
from disagg.worker.parts import EngineParts

log = logging.getLogger(__name__)


def make_engine(
    settings: WorkerSettings, role: Role, keys: ClusterKeys, progress: Callable[[str], None]
) -> EngineParts:
    """Load the model and cut the pools. Raises ModelRefused, BudgetTooSmall, StepMemoryShort or PoolMemoryShort."""
    check_device(settings.device)
    use_device(settings.device)
    torch.set_num_threads(settings.threads or num_cores())
    folder = resolve_model(settings.model)
    progress("loading model")
    model = _load(settings, folder)
    steps = plan_steps(settings, role, model, folder)
    progress("allocating KV cache")
    budget = kv_budget(settings, steps)
    max_model_len = _choose_model_len(settings, model, budget)
    swa_scratch = _swa_scratch(settings, role)
    layout = derive_layout(
        model.layers,
        block_size=settings.block_size,
        max_model_len=max_model_len,
        uses_scratch=swa_scratch != "off",
    )
    size = CacheSize(
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        step_tokens=1 if role == "decode" else settings.max_num_batched_tokens,  # it computes prompts only for others
    )
    num_slots = size.slots(layout, budget)
    model_fingerprint = fingerprint(folder, verify_weights=settings.verify_weights)
    hasher = BlockHasher(keys.prefix_hash, model_fingerprint) if settings.enable_prefix_caching else None
    filling = Filling(layout, num_slots, progress)
    cache = KVCache(layout, num_slots, settings.device, hasher, on_filled=filling.add)
    if cache.is_staged:
        host, staging = format_nbytes(sum(pool.sides.host.nbytes for pool in cache.pools)), format_nbytes(steps.staging)
        log.info("host memory: %s as the pools' side for peers, up to %s of pinned staging", host, staging)
    config = EngineConfig(
        role=role,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len,
        check_invariants=settings.check,
        vocab_size=model.vocab_size,
        prefix_recheck_s=settings.prefix_recheck_s if settings.device == "cpu" else None,  # hashed where memory is ours
        swa_scratch=swa_scratch,
        steps_ahead=_steps_ahead(settings, model),
    )
    identity = _identity(model, model_fingerprint, max_model_len, keys)
    ready = _ready(settings, role, layout, num_slots, max_model_len)
    ready |= {"dtype": model.dtype, "step_memory": steps.total}
    if settings.enable_prefix_caching:
        ready |= _reuse(size, layout, num_slots, budget)
    runner, graphs = make_runner(settings, role, model, cache, max_model_len, progress, steps)
    if graphs.refusal:
        ready["eager"] = graphs.refusal
    if settings.torch_compile or backend(model.device).NAME == "triton":
        progress("compiling")
        warm_up(runner, cache, max_model_len)
    engine = Engine(runner, cache, config, graphs)
    return EngineParts(role, settings, identity, layout, cache, engine, ready, lambda: int(model.saturated))


def _swa_scratch(settings: WorkerSettings, role: Role) -> str:
    if settings.swa_scratch != "off" and role != "prefill":
        log.warning("`--swa-scratch`: only prefill workers have scratch slots, this worker's role is `%s`", role)
        return "off"
    return settings.swa_scratch


def _identity(model: LoadedModel, model_fingerprint: str, max_model_len: int, keys: ClusterKeys) -> Identity:
    return Identity(
        protocol_major=PROTOCOL[0],
        model_fingerprint=model_fingerprint,
        attention=model.attention,
        compute_dtype=model.dtype,
        max_model_len=max_model_len,
        hash_key_id=keys.hash_key_id,
    )


class Filling:
    """Says how much of the KV cache is there, while its pools are made."""

    def __init__(self, layout: CacheLayout, num_slots: tuple[int, ...], progress: Callable[[str], None]) -> None:
        nbytes = sum(count * size for count, size in zip(num_slots, layout.slot_nbytes, strict=True))
        self._total, self._done, self._progress = nbytes, 0, progress

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        done, total = format_nbytes(min(self._done, self._total)), format_nbytes(self._total)
        self._progress(f"allocating KV cache: {done} of {total}")


def _steps_ahead(settings: WorkerSettings, model: LoadedModel) -> int:
    """Where the host itself computes the steps, there is nothing to overlap."""
    if settings.overlap_steps and model.device.type != "cuda":
        log.warning("`--overlap-steps`: this worker's host computes its steps, one after another")
        return 0
    return int(settings.overlap_steps)


def _load(settings: WorkerSettings, folder: Path) -> LoadedModel:
    model = load_model(
        folder,
        dtype=settings.dtype,
        device=settings.device,
        kv_cache_dtype=settings.kv_cache_dtype,
        kv_scales=settings.kv_scales,
        prefer=_prefer(settings) if torch.device(settings.device).type == "cpu" else None,
    )
    if model.device.type == "cpu" and not settings.torch_compile:  # a compiler has its own order of weights
        suit_cpu(model.module)
    return model


def _prefer(settings: WorkerSettings) -> Callable[[str, int], str]:
    """What a CPU worker computes in without `--dtype`, and says that it does."""
    prefer = cpu_dtype.preferred_dtype(cpu_dtype.this_processor(), cpu_dtype.share_of_memory(settings.memory_share))

    def chosen(checkpoint: str, num_parameters: int) -> str:
        dtype = prefer(checkpoint, num_parameters)
        cpu_dtype.say_choice(checkpoint, dtype)
        return dtype

    return chosen


def make_runner(
    settings: WorkerSettings,
    role: Role,
    model: LoadedModel,
    cache: KVCache,
    max_model_len: int,
    progress: Callable[[str], None],
    steps: StepMemory,
) -> tuple[StepRunner, GraphUse]:
    """Graphs where they can be captured: on CUDA with Triton, else every step is eager.

    Decode graphs for a worker that decodes, pieces for steps with prompt tokens where they are asked for. Of a model
    that no graph can hold every step is eager too, and `GraphUse.refusal` says why. `steps`: what was planned for them.
    Raises StepMemoryShort where they do not fit.
    """
    use = GraphUse()
    if not captures_graphs(settings, model.device):
        if settings.piecewise_graphs:
            log.warning("`--piecewise-graphs`: this worker captures no graphs, steps run eager")
        return _eager(settings, model, cache), use
    maker = CudaGraphs(model.device)
    try:
        eager = _piecewise(settings, model, cache, maker, use, progress)
        if role == "prefill":
            return eager, use
        progress("capturing decode graphs")
        graphs = DecodeGraphs(
            model, cache, maker, max_num_seqs=settings.max_num_seqs, max_model_len=max_model_len, use=use
        )
        graphs.capture()
    except RuntimeError as exc:  # torch's report of what this model does that a graph cannot hold; Dynamo's are too
        if is_out_of_memory(exc):
            raise capture_short(settings, steps) from exc
        reason = f"capture failed: {(str(exc).strip() or '?').splitlines()[0]}"
        log.warning("steps run without CUDA graphs: %s", reason)
        return _eager(settings, model, cache), GraphUse(refusal=reason)
    report_capture(use.nbytes, steps)
    return GraphRunner(eager, graphs), use


def _eager(settings: WorkerSettings, model: LoadedModel, cache: KVCache) -> Runner:
    if not settings.torch_compile:
        return Runner(model, cache)
    from disagg.engine.run.compiled import CompiledRunner

    return CompiledRunner(model, cache)


def _piecewise(
    settings: WorkerSettings,
    model: LoadedModel,
    cache: KVCache,
    maker: GraphMaker,
    use: GraphUse,
    progress: Callable[[str], None],
) -> Runner:
    if not settings.piecewise_graphs:
        return _eager(settings, model, cache)
    from disagg.engine.run.pieces.runner import PiecewiseRunner

    progress("tracing the model and capturing its pieces")
    runner = PiecewiseRunner(
        model,
        cache,
        maker,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_rows=settings.max_num_seqs,
        use=use,
    )
    runner.capture()
    return runner


def _choose_model_len(settings: WorkerSettings, model: LoadedModel, budget: int) -> int:
    """What was asked, checked against the model; or the most that model and budget allow."""
    limit, asked = model.max_position_embeddings, settings.max_model_len
    if asked is not None:
        check_model_len(asked, limit)
        return asked
    layout = derive_layout(model.layers, block_size=settings.block_size, max_model_len=limit)
    fits = largest_model_len(
        layout, budget, max_model_len=limit, max_num_batched_tokens=settings.max_num_batched_tokens
    )
    return fits or limit  # when nothing fits, the split says so with the numbers


def _reuse(size: CacheSize, layout: CacheLayout, num_slots: tuple[int, ...], budget: int) -> dict[str, str]:
    """What is left for prefixes beside one running sequence, also logged, and what to change when that is nothing."""
    found = {"reuse": room_in_words(size.room(layout, num_slots))}
    log.info("for prefixes beside one running sequence: %s", found["reuse"])
    if (sentence := advice(layout, size, budget)) is not None:
        log.warning("%s", sentence)
        found["reuse_advice"] = sentence
    return found


def _ready(
    settings: WorkerSettings, role: Role, layout: CacheLayout, num_slots: tuple[int, ...], max_model_len: int
) -> dict[str, Any]:
    """What `up` shows of this worker."""
    return {
        "event": "ready",
        "worker_id": settings.name(role),
        "memory": sum(count * nbytes for count, nbytes in zip(num_slots, layout.slot_nbytes, strict=True)),
        "threads": torch.get_num_threads(),
        "max_model_len": max_model_len,
        "device": settings.device,
        "pid": os.getpid(),
    }
