"""Rows times a packed weight in the compiled helper (`native_matmul.c`): float32, one thread, for few rows above all.

A row's result does not depend on the rows beside it: its sums are made in one order.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Final

import torch

from disagg.kernels import native
from disagg.kernels.dispatch import CALLS

MULTIPLY: Final = "native:multiply"
PANEL: Final = 32
"""Outputs that lie together, as in native_matmul.c."""
ROWS_AT_ONCE: Final = 4096  # of a weight that is looked at: a head of gigabytes needs no second one beside it
MAX_QUICK_PRODUCTS: Final = 1 << 22
"""Calls of up to so many multiplications keep Python's lock: about 60 µs, 120 with AVX2, where a thread that wants it
waits for up to 5 ms."""


class _Weight(ctypes.Structure):
    """The struct Weight of native_parts.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("depth", "num_outputs", "is_bfloat16")),
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
    )


def _typed(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    if library is not None:
        array, number = ctypes.c_void_p, ctypes.c_int64
        library.disagg_multiply.argtypes = (array, number, array, number, array)
        library.disagg_multiply.restype = None
    return library


_free, _quick = _typed(native.library()), _typed(native.quick_library())


def is_fast() -> bool:
    """Whether this processor has vectors for which the helper's products are fast."""
    return _free is not None and bool(_free.disagg_multiplies_fast())


def serves(dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` should be multiplied here, by the thread that asks alone."""
    return dtype == torch.float32 and torch.get_num_threads() == 1 and is_fast()


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight `[num_outputs, depth]` in panels, and a bias `[num_outputs]` or None, float32.

    `panels`: `[num_panels, depth, PANEL]`; in bfloat16 where that holds every number exactly.
    """

    panels: torch.Tensor
    bias: torch.Tensor | None
    depth: int
    num_outputs: int
    _struct: _Weight = field(init=False)

    def __post_init__(self) -> None:
        assert self.panels.is_contiguous()
        assert self.panels.shape[1:] == (self.depth, PANEL)
        assert self.bias is None or (self.bias.dtype == torch.float32 and self.bias.is_contiguous())
        is_bfloat16 = self.panels.dtype == torch.bfloat16
        bias = None if self.bias is None else self.bias.data_ptr()
        struct = _Weight(self.depth, self.num_outputs, is_bfloat16, self.panels.data_ptr(), bias)
        object.__setattr__(self, "_struct", struct)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._struct)


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    """From float32 `weight` `[num_outputs, depth]`, of which nothing is kept."""
    num_outputs, depth = weight.shape
    is_narrow = all(torch.equal(rows.to(torch.bfloat16).float(), rows) for rows in torch.split(weight, ROWS_AT_ONCE))
    held = weight.to(torch.bfloat16) if is_narrow else weight
    missing = -num_outputs % PANEL
    filled = torch.nn.functional.pad(held, (0, 0, 0, missing)) if missing else held
    panels = filled.reshape(-1, PANEL, depth).transpose(1, 2)
    if is_narrow:  # outputs i and i + PANEL / 2 side by side: see native_parts.h
        panels = panels.reshape(-1, depth, 2, PANEL // 2).transpose(2, 3).flatten(2)
    return PackedWeight(panels.contiguous(), None if bias is None else bias.contiguous(), depth, num_outputs)


def multiply(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """float32 `x` `[n, depth]`, its rows in one piece, times `weight`, plus its bias: `[n, num_outputs]`."""
    assert _free is not None
    assert _quick is not None
    assert x.dtype == torch.float32
    num_rows, depth = x.shape
    assert depth == weight.depth
    CALLS[MULTIPLY] += 1
    out = torch.empty(num_rows, weight.num_outputs)
    library = _quick if num_rows * depth * weight.num_outputs <= MAX_QUICK_PRODUCTS else _free
    library.disagg_multiply(weight.address, num_rows, x.data_ptr(), x.stride(0), out.data_ptr())
    return out
