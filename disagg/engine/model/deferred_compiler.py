"""Imports that name torch's compiler, without loading it: it takes 1.5 s of CPU, and eager steps never call it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch

COMPILER: Final = "torch._dynamo"
MASK_TRACING: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
MASK_CONTEXT: Final = "TransformGetItemToIndex"


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """Inside, an import of `torch._dynamo` finds a stand-in, after it the compiler. No effect once it is loaded.

    The stand-in's decorators leave functions as they are, so what is decorated inside can be compiled later though its
    author excluded it. Names beyond those that transformers imports raise ImportError.
    """
    if COMPILER in sys.modules:
        yield
        return
    stand_ins = {COMPILER: _compiler(), MASK_TRACING: _mask_tracing()}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        vars(torch).pop("_dynamo", None)


def _compiler() -> ModuleType:
    module: Any = ModuleType(COMPILER)
    module.__path__ = []
    module.disable = module.allow_in_graph = module.assume_constant_result = _undecorated
    return module  # type: ignore[no-any-return]


def _mask_tracing() -> ModuleType:
    module = ModuleType(MASK_TRACING)
    setattr(module, MASK_CONTEXT, _mask_context)
    return module


def _mask_context() -> Any:
    """The real context manager, loaded by the first use: transformers enters it where it builds masks itself."""
    return getattr(importlib.import_module(MASK_TRACING), MASK_CONTEXT)()


def _undecorated(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """A decorator, or what makes one, that changes nothing."""
    return function if function is not None else _undecorated
