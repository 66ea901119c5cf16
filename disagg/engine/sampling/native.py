"""All rows of a step in one call of the compiled helper (`kernels/native_sampling.c`); rows are split over threads."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.engine.sampling.rows import Adjustments, Sampled, SampleRow
from disagg.kernels import native
from disagg.kernels.dispatch import CALLS
from disagg.transceiver.wire.messages.sampling_limits import MAX_LOGPROBS
from disagg.transceiver.wire.messages.values import TokenLogprobs

NAME: Final = "native:sample_rows"

MIN_LOGITS_PER_THREAD: Final = 1 << 19
"""Logits that a thread must have before it is woken: about 800 µs where tokens are drawn. A wake-up takes 50 µs on
idle cores, and a turn of the scheduler where others want them too."""


class _Row(ctypes.Structure):
    """`SampleRow` of native_sampling.c."""

    _fields_ = (
        ("position", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("inverse_temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("num_logprobs", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("least", "repetition", "frequency", "presence")),
        *((name, ctypes.c_void_p) for name in ("seen", "masked", "bias_ids", "used", "counts", "biases")),
        *((name, ctypes.c_int64) for name in ("num_masked", "num_biases", "num_used")),
    )


class _Sampled(ctypes.Structure):
    """The struct SampledRow of native_sampling.c."""

    _fields_ = (
        ("token_id", ctypes.c_int64),
        ("is_finite", ctypes.c_int64),
        ("logprob", ctypes.c_double),
        ("top_ids", ctypes.c_int64 * MAX_LOGPROBS),
        ("top", ctypes.c_double * MAX_LOGPROBS),
    )


def _functions() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        return None
    number, array = ctypes.c_int64, ctypes.c_void_p
    library.disagg_sample_rows.argtypes = (number, number, array, array, number, number, array, array)
    library.disagg_sample_rows.restype = None
    library.disagg_sample_scratch_nbytes.argtypes = (number,)
    library.disagg_sample_scratch_nbytes.restype = number
    return library


_library = _functions()


def is_loaded() -> bool:
    return _library is not None


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token per row of `logits` (float32 `[len(rows), vocab_size]`, on the CPU)."""
    assert _library is not None
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    CALLS[NAME] += 1
    given, drawn = (_Row * len(rows))(*map(_row, rows)), (_Sampled * len(rows))()
    arrays = ctypes.addressof(given), logits.data_ptr(), logits.stride(0), logits.shape[1]
    cuts = _cuts(*logits.shape)
    calls = [(*cut, *arrays, _scratch(i, logits.shape[1]), ctypes.addressof(drawn)) for i, cut in enumerate(cuts)]
    others = [_executor().submit(_library.disagg_sample_rows, *call) for call in calls[1:]]
    _library.disagg_sample_rows(*calls[0])
    for other in others:
        other.result()
    return [_sampled(one, row.num_logprobs) for one, row in zip(drawn, rows, strict=True)]


def _row(row: SampleRow) -> _Row:
    numbers = row.position, row.seed, row.inverse_temperature, row.top_p, row.top_k, row.num_logprobs, row.least
    return _Row(*numbers, 1.0) if row.adjustments is None else _Row(*numbers, *_adjusted(row.adjustments))


def _adjusted(given: Adjustments) -> tuple[float | int | None, ...]:
    lists = (given.masked, given.bias_ids, given.used, given.counts, given.biases)
    seen = None if given.seen is None else given.seen.ctypes.data
    sizes = len(given.masked), len(given.bias_ids), len(given.used)
    addresses = (array.ctypes.data for array in lists)
    return (given.repetition, given.frequency, given.presence, seen, *addresses, *sizes)


def _sampled(drawn: _Sampled, num_logprobs: int) -> Sampled:
    if not drawn.is_finite:
        return Sampled(0, None, finite=False)
    if num_logprobs < 0:
        return Sampled(drawn.token_id, None, finite=True)
    top = tuple(zip(drawn.top_ids[:num_logprobs], drawn.top[:num_logprobs], strict=True))
    return Sampled(drawn.token_id, TokenLogprobs(drawn.logprob, top), finite=True)


def _cuts(num_rows: int, vocab_size: int) -> list[tuple[int, int]]:
    """Rows of each thread, about as many each."""
    most = min(torch.get_num_threads(), num_rows, num_rows * vocab_size // MIN_LOGITS_PER_THREAD)
    ends = [num_rows * i // max(1, most) for i in range(max(1, most) + 1)]
    return list(itertools.pairwise(ends))


class _Scratch(threading.local):
    """Of each calling thread: an array per cut, kept, since fresh memory costs as much as the sampling."""

    def __init__(self) -> None:
        self.arrays: dict[int, npt.NDArray[np.float64]] = {}


_kept = _Scratch()


def _scratch(cut: int, vocab_size: int) -> int:
    assert _library is not None
    size = -(-_library.disagg_sample_scratch_nbytes(vocab_size) // 8)
    if cut not in _kept.arrays or len(_kept.arrays[cut]) < size:
        _kept.arrays[cut] = np.empty(size, np.float64)
    return int(_kept.arrays[cut].ctypes.data)


_threads: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    """Threads beside the caller's, made when they are first needed and kept."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="sampling")
    return _threads
