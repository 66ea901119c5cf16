"""Decode attention in the compiled helper (`native_attention.c`): reads K and V of the pool where they lie.

Torch operations gather each sequence's blocks and pad them to a common length first, which takes longer than the
attention itself. Rows are split over as many threads as torch uses. On CPUs, over KV in float32 or bfloat16, computed
in float32; the reference backend asks `serves` and has its own way otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels import native
from disagg.kernels.batch import PagedBatch, first_seen
from disagg.kernels.dispatch import CALLS

Int64 = npt.NDArray[np.int64]

ATTENTION: Final = "native:decode_rows"
WRITE: Final = "native:write_rows"

MIN_NBYTES_PER_THREAD: Final = 4 << 20
"""K and V that a thread must have to read before it is woken: at 16 GB/s 250 µs, several times what waking it takes."""


class AttentionLayout(ctypes.Structure):
    """The struct Layout of native_parts.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "queries_per_head", "head_dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("num_slots", "slot_stride", "kv_stride", "head_stride")),
        *((name, ctypes.c_int64) for name in ("query_stride", "query_head_stride", "is_bfloat16")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def _functions() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        return None
    array, number = ctypes.c_void_p, ctypes.c_int64
    library.disagg_decode_rows.argtypes = (ctypes.POINTER(AttentionLayout), number, number, *(array,) * 6)
    library.disagg_decode_rows.restype = number
    library.disagg_write_rows.argtypes = (number, array, array, number, number, *(array,) * 3, number, number)
    library.disagg_write_rows.restype = None
    return library


_library = _functions()
_is_on = True


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, torch operations answer: to compare the two. Process-wide."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


def is_loaded() -> bool:
    return _library is not None and _is_on


def serves(pool: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether decode queries of `dtype` over `pool` are answered here."""
    is_packed = pool.stride(3) == pool.shape[4] and pool.stride(4) == 1
    is_read = pool.dtype in (torch.float32, torch.bfloat16) and dtype in (torch.float32, pool.dtype)
    return is_loaded() and pool.device.type == "cpu" and is_read and is_packed


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decode queries of a step, for every layer of a group.

    `rows` int64 `[n, 5]`: the query's flat index, where its table begins in `tables` (int32, all sequences'),
    the first position of its window, its own, and how many leading positions it attends to beside the window. `cuts`:
    the items (row * num_kv_heads + kv head) of each thread.
    """

    rows: Int64
    tables: npt.NDArray[np.int32]
    cuts: tuple[tuple[int, int], ...]


def decode_rows(
    batch: PagedBatch, at: Int64, starts: Int64, tables: npt.NDArray[np.int32], offsets: Int64, pool: torch.Tensor
) -> DecodeRows:
    """Queries at flat indexes `at` and positions `starts`, whose tables begin at `offsets` of `tables`."""
    rows = np.zeros((len(at), 5), np.int64)
    rows[:, 0], rows[:, 1], rows[:, 3] = at, offsets, starts
    rows[:, 2] = first_seen(starts, batch.window)
    rows[:, 4] = np.minimum(rows[:, 2], batch.num_sink_tokens)
    return DecodeRows(rows, tables, _cuts(starts + 1 - rows[:, 2] + rows[:, 4], pool))


def _cuts(num_keys: Int64, pool: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Items of equal work per thread: all cost what K and V they read."""
    num_heads, head_nbytes = pool.shape[2], 2 * pool.shape[4] * pool.element_size()
    num_items = len(num_keys) * num_heads
    most = torch.get_num_threads()
    num_threads = 1 if most == 1 else min(most, int(num_keys.sum()) * num_heads * head_nbytes // MIN_NBYTES_PER_THREAD)
    if num_threads <= 1:
        return ((0, num_items),)
    done = np.cumsum(np.repeat(num_keys, num_heads))
    inner = np.searchsorted(done, done[-1] * np.arange(1, num_threads) // num_threads, side="right").tolist()
    return tuple((a, b) for a, b in zip([0, *inner], [*inner, num_items], strict=True) if a < b)


def attend(
    query: torch.Tensor,
    pool: torch.Tensor,
    decodes: DecodeRows,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write `out`, `[num_queries, num_heads, head_dim]`, contiguous, of the query's dtype: the decode rows as
    `ops.paged_attention`, what other rows hold is unspecified.
    """
    assert serves(pool, query.dtype)
    assert query.dtype == out.dtype
    assert out.is_contiguous()
    assert query.shape == out.shape
    if query.dtype != torch.float32:
        wide = torch.empty(out.shape)
        attend(query.float(), pool, decodes, scale, softcap, sink_logits, wide)
        out.copy_(wide)
        return
    CALLS[ATTENTION] += 1
    if query.stride(2) != 1:
        query = query.contiguous()
    assert query.shape[2] == pool.shape[4]
    layout = layout_of(pool, query.shape[1], query.stride()[:2], scale, softcap)
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    places = (query.data_ptr(), pool.data_ptr(), None if sinks is None else sinks.data_ptr(), out.data_ptr())
    lists = (decodes.rows.ctypes.data, decodes.tables.ctypes.data)
    _run(decodes, layout, (*lists, *places))


def layout_of(
    pool: torch.Tensor, num_heads: int, query_strides: Sequence[int], scale: float, softcap: float | None
) -> AttentionLayout:
    """`query_strides`: numbers between queries, and between the heads of one."""
    num_slots, _, num_kv_heads, block_size, head_dim = pool.shape
    return AttentionLayout(
        *(num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, num_slots),
        *pool.stride()[:3],
        *query_strides,
        pool.dtype == torch.bfloat16,
        scale,
        softcap or 0.0,
    )


def _run(decodes: DecodeRows, layout: AttentionLayout, pointers: tuple[int | None, ...]) -> None:
    assert _library is not None
    function, address = _library.disagg_decode_rows, ctypes.byref(layout)
    others = [executor().submit(function, address, *cut, *pointers) for cut in decodes.cuts[1:]]
    results = [function(address, *decodes.cuts[0], *pointers), *(other.result() for other in others)]
    for failed in filter(None, results):
        raise AssertionError(f"a query at {decodes.rows[failed - 1, 3]} needs a block that has no slot")


_threads: ThreadPoolExecutor | None = None


def executor() -> ThreadPoolExecutor:
    """Threads beside the caller's, made when they are first needed and kept."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="attention")
    return _threads


def can_write(pool: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `write` stores these as they are: no conversion, heads in one piece."""
    is_packed = pool.stride(4) == key.stride(2) == value.stride(2) == 1
    return is_loaded() and is_packed and pool.device.type == "cpu" and key.dtype == value.dtype == pool.dtype


def write(pool: torch.Tensor, at: Int64, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store `key` and `value`, `[n, num_kv_heads, head_dim]`; `at[i]`: the element of `pool` where K of head 0 goes.

    IndexError where one lies outside the pool, as torch answers: C would write there.
    """
    assert _library is not None
    assert can_write(pool, key, value)
    assert len(at) == len(key) == len(value)
    if len(at) and at.view(np.uint64).max() >= pool.shape[0] * pool.stride(0):  # one pass: a negative one is huge
        raise IndexError(f"K and V to slots {np.unique(at // pool.stride(0))} of a pool of {pool.shape[0]}")
    assert key.shape[1:] == value.shape[1:] == (pool.shape[2], pool.shape[4])
    CALLS[WRITE] += 1
    size = pool.element_size()
    at, strides = at * size, np.array([*key.stride()[:2], *value.stride()[:2]], np.int64) * size
    where = (pool.data_ptr(), pool.stride(1) * size, pool.stride(2) * size)
    what = (key.data_ptr(), value.data_ptr(), strides.ctypes.data)
    _library.disagg_write_rows(len(at), at.ctypes.data, *where, *what, pool.shape[2], pool.shape[4] * size)
