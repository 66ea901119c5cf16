"""Rows for samplers: logits and parameters at the extremes of what is accepted, and every implementation by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import strategies as st

from disagg.engine.sampling import native, plain
from disagg.engine.sampling.rows import Sampled, SampleInput, SampleRow
from disagg.kernels import native as helper
from disagg.transceiver.wire.messages.values import Sampling

Implementation = Callable[[torch.Tensor, Sequence[SampleRow]], list[Sampled]]

LARGEST = float(np.finfo(np.float32).max)
SIZES = (1, 2, 5, 63, 64, 65, 200, 1000)
SCALES = (0.0, 1e-38, 1e-6, 1.0, 3.0, 10.0, 1e30, LARGEST / 8)


@contextmanager
def widest(bits: int) -> Iterator[None]:
    """Inside, the compiled helper uses no wider vectors."""
    library = helper.library()
    assert library is not None
    width = ctypes.c_int.in_dll(library, "disagg_widest_vectors")
    before, width.value = width.value, bits
    try:
        yield
    finally:
        width.value = before


def _at_width(bits: int) -> Implementation:
    def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        with widest(bits):
            return native.sample(logits, rows)

    return sample


def implementations() -> dict[str, Implementation]:
    """NumPy's, and where the helper is built its three widths."""
    found: dict[str, Implementation] = {"plain": plain.sample}
    return found | ({f"native {bits}": _at_width(bits) for bits in (512, 256, 0)} if native.is_loaded() else {})


@st.composite
def logits(draw: st.DrawFn) -> np.ndarray:
    """Float32, finite: random, of few values, or all alike, at scales from 0 to the largest there are."""
    size, scale = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SCALES))
    values = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(size).clip(-8, 8)
    if draw(st.booleans()):
        values = values.round()
    if draw(st.integers(0, 4)) == 0:
        values = -np.abs(values)
    return (values * scale).astype(np.float32)


@st.composite
def inputs(draw: st.DrawFn, size: int) -> SampleInput:
    """Parameters that the API accepts, each often at its ends."""
    ids = st.integers(-2, size + 1)
    sampling = Sampling(
        max_tokens=100,
        seed=draw(st.sampled_from([0, -1, 2**63 - 1, -(2**63), 2**64 - 1]) | st.integers(0, 2**62)),
        temperature=draw(_among(0, 5e-324, 1e-308, 1e-40, 2.0**-126, 1e-37, 1e-3, 0.5, 1, 1, 1, 2, 1e30, 1.7e308)),
        top_k=draw(_among(0, 0, 1, 2, 10, size, size + 1, 2**31 - 1)),
        top_p=draw(_among(1, 1, 0.9, 0.5, 5e-324, 1e-9, 0.999999, 1 - 2.0**-53)),
        min_p=draw(_among(0, 0, 5e-324, 0.05, 0.9, 1)),
        repetition_penalty=draw(_among(1, 1, 1.1, 0.5, 5e-324, 1e-46, 1e39, 1.7e308)),
        presence_penalty=draw(_among(0, 0, 5e-324, 2, -2)),
        frequency_penalty=draw(_among(0, 0, 5e-324, 2, -2)),
        logit_bias=tuple(draw(st.lists(st.tuples(ids, _among(100.0, -100.0, 5e-324)), max_size=3))),
        min_tokens=draw(_among(0, 0, 3)),
        eos_token_ids=tuple(draw(st.lists(ids, max_size=3))),
        stop_token_ids=tuple(range(size)) if draw(st.integers(0, 9)) == 0 and size <= 256 else (),
        num_logprobs=draw(_among(None, None, 0, 1, 20)),
    )
    prompt, output = draw(st.lists(ids, max_size=50)), draw(st.lists(st.integers(0, size - 1), max_size=20))
    return SampleInput(sampling, draw(_among(0, 7, 2**40)), prompt, output)


def _among(*values: object) -> st.SearchStrategy:  # type: ignore[type-arg]  # of whatever the values are
    return st.sampled_from(values)
