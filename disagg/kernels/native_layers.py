"""What lies between a layer's matmuls on a CPU, in the compiled helper (`native_layers.c`), in float32.

Norms, gated activations, and the way of a packed projection to attention: in torch operations five to ten calls each,
which for the few rows of a decode step take longer than the matmuls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels import native, native_attention
from disagg.kernels.dispatch import CALLS
from disagg.kernels.qkv import HeadNorms, Rotary

Int64 = npt.NDArray[np.int64]

NORM: Final = "native:norm_rows"
GATE: Final = "native:gate_rows"
QKV: Final = "native:take_qkv"

SILU, GELU_TANH = 0, 1
"""Activations of a gate: x / (1 + e^-x), and gelu by its tanh form."""

MAX_QUICK_ELEMENTS: Final = 1 << 15
"""Calls over up to so many numbers keep Python's lock: they take about 10 µs."""

MIN_ELEMENTS_PER_THREAD: Final = 1 << 18
"""Numbers that a thread must have before it is woken, which costs 50 µs on idle cores: about 150 µs of work."""


class Projection(ctypes.Structure):
    """The struct Projection of native_parts.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "half")),
        *((name, ctypes.c_int64) for name in ("qkv_stride", "kv_stride", "head_stride", "normed")),
        ("epsilon", ctypes.c_float),
    )


_NUMBER, _ARRAY = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: Final = {
    "disagg_norm_rows": (_NUMBER, _NUMBER, _ARRAY, _NUMBER, _ARRAY, ctypes.c_float, _ARRAY),
    "disagg_gate_rows": (_NUMBER, _NUMBER, _ARRAY, _NUMBER, _NUMBER, _ARRAY),
    "disagg_take_qkv": (_ARRAY, _NUMBER, *(_ARRAY,) * 8),
}


def _typed(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    if library is not None:
        for name, types in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
    return library


_free, _quick = _typed(native.library()), _typed(native.quick_library())


def is_loaded() -> bool:
    return _free is not None and native_attention.is_loaded()


def _call(name: str, num_rows: int, width: int, call: Callable[..., None]) -> None:
    """`call(function, first, last)` for all rows: at once with the lock held, at once without it, or in parts."""
    if num_rows * width <= MAX_QUICK_ELEMENTS:
        call(getattr(_quick, name), 0, num_rows)
        return
    function = getattr(_free, name)
    num_parts = max(1, min(torch.get_num_threads(), num_rows, num_rows * width // MIN_ELEMENTS_PER_THREAD))
    cuts = list(pairwise(num_rows * i // num_parts for i in range(num_parts + 1)))
    others = [native_attention.executor().submit(call, function, *cut) for cut in cuts[1:]]
    call(function, *cuts[0])
    for other in others:
        other.result()


def norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm over the last dimension of float32 `x`, times `gain` `[width]`; contiguous, of the same shape."""
    CALLS[NORM] += 1
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape)
    num_rows, width = rows.shape
    source, target, gains, stride = rows.data_ptr(), out.data_ptr(), gain.data_ptr(), rows.stride(0)

    def call(function: Callable[..., None], first: int, last: int) -> None:
        places = (source + 4 * first * stride, stride, gains, epsilon, target + 4 * first * width)
        function(last - first, width, *places)

    _call("disagg_norm_rows", num_rows, width, call)
    return out


def gate(both: torch.Tensor, kind: int) -> torch.Tensor:
    """act(gates) * what they gate, from float32 `both` `[n, 2 * width]`; `[n, width]`. `kind`: SILU or GELU_TANH."""
    CALLS[GATE] += 1
    num_rows, width, stride = both.shape[0], both.shape[1] // 2, both.stride(0)
    out = torch.empty(num_rows, width)
    source, target = both.data_ptr(), out.data_ptr()

    def call(function: Callable[..., None], first: int, last: int) -> None:
        function(last - first, width, source + 4 * first * stride, stride, kind, target + 4 * first * width)

    _call("disagg_gate_rows", num_rows, 2 * width, call)
    return out


def serves_qkv(qkv: torch.Tensor, pool: torch.Tensor) -> bool:
    """Whether `preprocess_qkv` takes them: float32 on both sides, heads in one piece."""
    is_packed = pool.stride(4) == qkv.stride(1) == 1 and pool.stride(3) == pool.shape[4]
    is_wide = qkv.dtype == pool.dtype == torch.float32
    return is_loaded() and is_packed and is_wide and qkv.device.type == pool.device.type == "cpu"


def projection_of(pool: torch.Tensor, stride: int, num_heads: int, half: int, norms: HeadNorms | None) -> Projection:
    """`stride`: numbers between rows of the projection; `half`: pairs of dimensions that are rotated."""
    normed = 0 if norms is None else sum(1 << kind for kind, is_normed in enumerate(norms.normed) if is_normed)
    shape = (num_heads, pool.shape[2], pool.shape[4], half)
    return Projection(*shape, stride, pool.stride(1), pool.stride(2), normed, norms.epsilon if norms else 0.0)


def preprocess_qkv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    at: Int64,
    num_heads: int,
    bias: torch.Tensor | None,
    norms: HeadNorms | None,
    angles: Rotary | None,
) -> torch.Tensor:
    """As `ops.preprocess_qkv`; `at[i]`: the element of `pool` where K of row i's head 0 goes.

    IndexError where one lies outside the pool.
    """
    assert serves_qkv(qkv, pool)
    assert len(at) == len(qkv)
    if len(at) and at.view(np.uint64).max() >= pool.shape[0] * pool.stride(0):  # one pass: a negative one is huge
        raise IndexError(f"K and V to slots {np.unique(at // pool.stride(0))} of a pool of {pool.shape[0]}")
    CALLS[QKV] += 1
    head_dim = pool.shape[4]
    query = torch.empty(len(qkv), num_heads, head_dim)
    half = 0 if angles is None else angles.cos.shape[1]
    of = projection_of(pool, qkv.stride(0), num_heads, half, norms)
    biases = None if bias is None else bias.float().contiguous()
    source, cos, sin = qkv.data_ptr(), *((0, 0) if angles is None else (angles.cos.data_ptr(), angles.sin.data_ptr()))
    kept = (None if biases is None else biases.data_ptr(), None if norms is None else norms.gains.data_ptr())
    places, memory, target, address = at.ctypes.data, pool.data_ptr(), query.data_ptr(), ctypes.addressof(of)

    def call(function: Callable[..., None], first: int, last: int) -> None:
        angles_at = (cos + 4 * first * half, sin + 4 * first * half) if half else (None, None)
        to = (places + 8 * first, memory, target + 4 * first * num_heads * head_dim)
        function(address, last - first, source + 4 * first * qkv.stride(0), *kept, *angles_at, *to)

    _call("disagg_take_qkv", len(qkv), qkv.shape[1], call)
    return query
