"""The sampler's Triton kernel, in the interpreter, against NumPy's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.interpreter import missing_interpreter
from support.oracles.sampling_rows import inputs

from disagg.engine.sampling import plain
from disagg.engine.sampling.rows import SampleInput, plan_row
from disagg.transceiver.wire.messages.values import Sampling

pytestmark = pytest.mark.skipif(missing_interpreter() is not None, reason=missing_interpreter() or "")

BLOCK = 64  # several passes of a small vocabulary
OPTIONS = [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 50, "top_p": 0.5, "min_p": 0.01}, {"frequency_penalty": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "free")
def test_rows_have_the_tokens_of_numpy(options: dict[str, float]) -> None:
    from disagg.engine.sampling import triton

    rng = np.random.default_rng(2)
    values = torch.from_numpy((rng.standard_normal((5, 150)) * 2.5).astype(np.float32))
    values[3] = values[3].round()  # ties
    values[4, 7] = torch.nan
    asked = [
        SampleInput(Sampling(max_tokens=9, seed=i - 2, **options), 2**35 + i, (1,), (4, 4))  # type: ignore[arg-type]
        for i in range(5)
    ]
    rows = [plan_row(one, 150) for one in asked]
    assert triton.sample(values, rows, BLOCK) == plain.sample(values, rows)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_accepted_extremes_have_the_tokens_of_numpy(data: st.DataObject) -> None:
    from disagg.engine.sampling import triton

    scale = data.draw(st.sampled_from([0.0, 1.0, 1e30]))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((1, 70)).astype(np.float32)
    logits = torch.from_numpy((values * scale).astype(np.float32))
    row = plan_row(data.draw(inputs(70)), 70)
    (ours,), (numpy,) = triton.sample(logits, [row], BLOCK), plain.sample(logits, [row])
    assert (ours.token_id, ours.finite) == (numpy.token_id, numpy.finite)
    if ours.logprobs is not None and numpy.logprobs is not None:
        assert ours.logprobs.logprob == pytest.approx(numpy.logprobs.logprob, rel=1e-6, abs=1e-6)


def test_weights_are_those_of_numpy_to_the_last_bit() -> None:
    """Of nucleus filters: with equal weights every program draws from the same few."""
    from disagg.engine.sampling import triton

    values = torch.linspace(-90, 0, 300)[None]
    for top_p in (0.1, 0.5, 0.9, 0.99, 0.999999):
        rows = [plan_row(SampleInput(Sampling(max_tokens=1, seed=1, top_p=top_p), 1, (), ()), 300)]
        assert triton.sample(values, rows, BLOCK) == plain.sample(values, rows)
