"""The only importer of `transformers`. Everything else in disagg asks this module.

Transformers probes for a distribution called `kernels` while it imports itself, and would import or download hub
kernels through it. A folder or wheel of that name that is not the hub's breaks `import LlamaForCausalLM`, so the probe
is switched off before anything else of transformers is touched. So is the one for torch.distributed, which no model
here asks transformers to use, and which takes 0.7 s to import; the compiler waits until it is asked for.
"""

from __future__ import annotations

import transformers.utils as _utils
import transformers.utils.import_utils as _import_utils


def _not_available(*_args: object, **_kwargs: object) -> bool:
    return False


for _asked in (_utils, _import_utils):  # each module of transformers takes the probes from one or the other
    vars(_asked).update(is_kernels_available=_not_available, is_torch_distributed_available=_not_available)

import contextlib  # noqa: E402
import logging  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterable, Iterator, Mapping  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

from disagg.engine.model.attention import paged_attention  # noqa: E402
from disagg.engine.model.deferred_compiler import compiler_deferred  # noqa: E402
from disagg.engine.model.opaque_attention import (  # noqa: E402
    COMPILED_ATTENTION_NAME,
    TRACED_ATTENTION_NAME,
    compiled_attention,
    traced_attention,
)

# A version of transformers that wants more of the compiler than its stand-in has loads it below, at its first use.
with contextlib.suppress(ImportError), compiler_deferred():
    import transformers.masking_utils
    import transformers.modeling_utils

log = logging.getLogger(__name__)

# Registered for attention but not for masks, so that transformers builds none: ours follow from positions.
ATTENTION_NAME = "disagg_paged"
transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
transformers.AttentionInterface.register(TRACED_ATTENTION_NAME, traced_attention)
transformers.AttentionInterface.register(COMPILED_ATTENTION_NAME, compiled_attention)

_hf: Any = transformers  # its lazy module shows type checkers only some of its names
PROGRESS_INTERVAL_S = 5.0  # a line now and then: a log, not an animation


def load_config(folder: Path) -> Any:
    """The model's configuration as transformers understands it. Raises OSError, ValueError, KeyError or TypeError."""
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def build_skeleton(class_name: str, config: Any) -> torch.nn.Module:
    """The model on the meta device: every module and shape, no weights.

    In bfloat16: the one dtype for which torch's grouped matmul (experts of gpt-oss and Gemma 4) knows meta shapes.
    """
    with torch.device("meta"), _quiet():
        module = getattr(transformers, class_name)(config)
    return _with_our_attention(module.to(torch.bfloat16))


def load_weights(
    class_name: str, config: Any, folder: Path, dtype: torch.dtype, renames: Mapping[str, str], dequantise: bool
) -> tuple[torch.nn.Module, frozenset[str], frozenset[str]]:
    """The model on the CPU, and the names of tensors that it misses and that it has no use for."""
    extra = {"quantization_config": _hf.Mxfp4Config(dequantize=True)} if dequantise else {}
    with _quiet(), _logged_progress():
        module, info = getattr(transformers, class_name).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            key_mapping=dict(renames) or None,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **extra,
        )
    return _with_our_attention(module), frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"])


def _with_our_attention(module: Any) -> torch.nn.Module:
    module.set_attn_implementation(ATTENTION_NAME)
    evaluated: torch.nn.Module = module.eval()
    return evaluated


def _has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies all experts' groups in one kernel, which reads their sizes where they are.

    On CUDA that is so for bfloat16 on Hopper and datacentre Blackwell (torch 2.9 to 2.13). For anything else it brings
    the sizes to the host and multiplies group by group, which no graph can hold.
    """
    return dtype == torch.bfloat16 and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10))


@contextmanager
def capturable_experts(module: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, mixture-of-experts layers run in operations that a CUDA graph can hold.

    Where grouped products cannot be, each token's experts are copied and multiplied as a batch. That takes memory by
    the token, so it serves captures alone: eager steps, with their long prompts, keep what transformers chose.
    """
    before = getattr(module.config, "_experts_implementation", None)
    if before != "grouped_mm" or _has_grouped_kernel(device, dtype):
        yield
        return
    module.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        module.set_experts_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own reports off: what they would say is checked and told by us."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


class _Progress:
    """What transformers shows as a bar, as log lines. Takes the part of tqdm that loading uses."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None, **_: object
    ) -> None:
        self.iterable, self.desc = iterable or (), desc or "loading"
        self.total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)  # type: ignore[arg-type]
        self.done, self.told_at = 0, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.told_at >= PROGRESS_INTERVAL_S:
            self.told_at = time.monotonic()
            log.info("%s: %d of %s", self.desc, self.done, self.total if self.total is not None else "unknown")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        """The rest of tqdm (set_description, refresh, ...) only draws."""
        return lambda *_args, **_kwargs: None


@contextmanager
def _logged_progress() -> Iterator[None]:
    before = hf_logging.set_tqdm_hook(lambda _factory, args, kwargs: _Progress(*args, **kwargs))
    try:
        yield
    finally:
        hf_logging.set_tqdm_hook(before)
