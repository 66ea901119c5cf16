"""Which implementation serves a device, and how often each of its parts ran.

Triton serves CUDA where it can be imported, torch operations serve everything else. `DISAGG_KERNELS=torch|triton` in
the environment, or `forced` in a test, overrides that; Triton serves a CPU only in its interpreter
(`TRITON_INTERPRET=1` before triton is imported), thousands of times slower: to test, never to serve.
Where Triton serves, what lies between a layer's projections and its attention is one kernel (`preprocess_qkv`);
`DISAGG_FUSED_QKV=on|off` overrides that. In torch operations it is as fast as transformers' own, so that stays where
the compiled helper does not have the step either (`native_layers`).
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

import torch

log = logging.getLogger(__name__)

CALLS: Final[Counter[str]] = Counter()
"""`<backend>:<operation>` for every operation asked for, `kernel:<name>` for every Triton kernel launched, and
`graph:<kind>` for every replay of a captured graph, which asks for nothing and launches what it recorded."""

VARIABLE: Final = "DISAGG_KERNELS"
FUSED_VARIABLE: Final = "DISAGG_FUSED_QKV"
_MODULES: Final = {"torch": "disagg.kernels.reference", "triton": "disagg.kernels.triton.backend"}


def _checked(name: str | None) -> str | None:
    if name is not None and name not in _MODULES:
        raise ValueError(f"{VARIABLE}={name!r}: expected torch or triton, or unset to choose by device")
    return name


_forced = _checked(os.environ.get(VARIABLE) or None)


def backend(device: torch.device) -> ModuleType:
    """The module that implements the operations of `ops` for tensors on `device`. ValueError for other devices."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device.type}, expected cpu or cuda")
    return _load(_forced or ("triton" if device.type == "cuda" and has_triton() else "torch"))


def fuses_qkv(device: torch.device) -> bool:
    """Whether models on `device` are given the fused step between projections and attention."""
    value = _fused_value()
    return bool(backend(device).NAME == "triton") if value is None else value == "on"


def may_fuse_qkv() -> bool:
    """Whether the environment lets models be given the fused step where something else than Triton serves it."""
    return _fused_value() != "off"


def _fused_value() -> str | None:
    value = os.environ.get(FUSED_VARIABLE) or None
    if value not in (None, "on", "off"):
        raise ValueError(f"{FUSED_VARIABLE}={value!r}: expected on or off, or unset to choose by backend")
    return value


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported; a CUDA device without it is served by torch, and the log says so, once."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        log.warning("triton cannot be imported (%s): paged attention runs in torch operations", error)
        return False
    return True


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Inside, `name` ("torch" or "triton") serves every device; None: the device decides. Process-wide."""
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before
