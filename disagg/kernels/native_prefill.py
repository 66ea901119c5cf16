"""Attention of runs of several queries in the compiled helper (`native_prefill.c`), in float32: no gather, no mask."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from disagg.kernels import native, native_attention, native_matmul
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS
from disagg.kernels.native_attention import layout_of
from disagg.kernels.workspace import Workspace

RUN: Final = "native:attend_run"
MIN_PRODUCTS_PER_THREAD: Final = 1 << 23
"""Multiplications that a thread must have before it is woken, which costs 50 µs on idle cores: about 200 µs."""


class _Queries(ctypes.Structure):
    """The struct Queries of native_prefill.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("num_queries", "start", "window"))


def _functions() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        return None
    array, number = ctypes.c_void_p, ctypes.c_int64
    library.disagg_attend_run.argtypes = (array, array, number, number, *(array,) * 6)
    library.disagg_attend_run.restype = number
    library.disagg_prefill_room.argtypes = (number, number)
    library.disagg_prefill_room.restype = number
    return library


_library = _functions()


@dataclass(frozen=True, slots=True)
class NativeRun:
    """Queries from flat index `at` on. `window`: positions that each attends to, its own included; 0 for all."""

    at: int
    run: QueryRun
    window: int


def serves(pool: torch.Tensor, dtype: torch.dtype, batch: PagedBatch) -> bool:
    """Whether runs of `batch`, with queries of `dtype` over `pool`, are answered here."""
    return (
        native_attention.serves(pool, dtype)
        and native_matmul.is_fast()
        and dtype == pool.dtype == torch.float32
        and pool.shape[4] % native_matmul.PANEL == 0
        and batch.num_sink_tokens == 0
    )


def attend(
    query: torch.Tensor,
    pool: torch.Tensor,
    run: NativeRun,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    workspace: Workspace,
    out: torch.Tensor,
) -> None:
    """Write the run's rows of `out` `[num_queries, num_heads, head_dim]`, contiguous, as `ops.paged_attention`."""
    assert _library is not None
    assert out.is_contiguous()
    assert out.shape == query.shape
    CALLS[RUN] += 1
    if query.stride(2) != 1:
        query = query.contiguous()
    num_heads, head_dim = query.shape[1:]
    count, table = run.run.num_queries, np.ascontiguousarray(run.run.table, np.int32)
    layout, queries = (
        layout_of(pool, num_heads, query.stride()[:2], scale, softcap),
        _Queries(count, run.run.start, run.window),
    )
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    cuts = _cuts(num_heads, count * min(run.run.end, count + run.window if run.window else run.run.end) * head_dim)
    size = _library.disagg_prefill_room(head_dim, count)
    room = workspace.floats("prefill", size * (len(cuts) - 1), pool.device).data_ptr()
    row = 4 * run.at
    given = (table.ctypes.data, query.data_ptr() + row * query.stride(0), pool.data_ptr())
    sink, target = None if sinks is None else sinks.data_ptr(), out.data_ptr() + row * out.stride(0)

    def part(number: int, first: int, last: int) -> int:
        assert _library is not None
        of = ctypes.addressof(layout), ctypes.addressof(queries), first, last
        return int(_library.disagg_attend_run(*of, *given, sink, room + 4 * size * number, target))

    parts = list(enumerate(pairwise(cuts)))
    others = [native_attention.executor().submit(part, number, *cut) for number, cut in parts[1:]]
    failed = [part(0, *parts[0][1]), *(other.result() for other in others)]
    assert not any(failed), "a query needs a block that has no slot"


def _cuts(num_heads: int, products: int) -> list[int]:
    """The heads of each thread, which do `products` multiplications a head."""
    most = max(1, min(torch.get_num_threads(), num_heads, num_heads * products // MIN_PRODUCTS_PER_THREAD))
    return [num_heads * i // most for i in range(most + 1)]
