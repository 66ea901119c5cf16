"""Requests whose every sampling field is at the extremes that the API accepts, through the parser to sampled rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.sampling_oracle import choose
from support.oracles.sampling_rows import logits

from disagg.api.request.fields import COMPLETIONS, FIELDS, parse_params
from disagg.api.request.sampling import build_sampling
from disagg.engine.model.checkpoint import GenerationDefaults
from disagg.engine.sampler import SampleInput, sample

EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 5e-324, 1e-308, 2.0**-126, 1e-3, 1, 2, 1e30, 1.7e308),
    "top_p": (5e-324, 1e-9, 0.5, 1 - 2.0**-53, 1),
    "top_k": (-1, 0, 1, 2, 2**31 - 1),
    "min_p": (0, 5e-324, 0.05, 1),
    "repetition_penalty": (5e-324, 1e-46, 0.5, 1, 1e39, 1.7e308),
    "presence_penalty": (-2, 0, 5e-324, 2),
    "frequency_penalty": (-2, 0, 5e-324, 2),
    "logit_bias": ({}, {"0": -100}, {"0": 100, "1": 100}, {"0": 5e-324}),
    "seed": (-(2**63), -1, 0, 2**63 - 1),
    "min_tokens": (0, 3, 100),
    "stop_token_ids": ([], [0], list(range(256))),
    "ignore_eos": (False, True),
    "logprobs": (0, 1, 20),
    "n": (1, 128),
}
NO_CHOICE = {"max_tokens", "best_of", "prompt_logprobs", "include_stop_str_in_output", "stop"}
"""Of the request's generation, but no part in choosing a token from logits."""


def test_every_honoured_field_that_sampling_reads_is_driven_to_its_extremes() -> None:
    """A new field of sampling has to be added above."""
    named = {
        field.name for field in FIELDS if field.is_honoured and not field.is_fixed and COMPLETIONS in field.endpoints
    }
    body = parse_params(COMPLETIONS, {"prompt": "x"})
    sampling = build_sampling(body, GenerationDefaults(), max_tokens=100, seed=0)
    read = {name for name in named if hasattr(sampling, name)}
    assert read - NO_CHOICE - {"cache_salt"} <= EXTREMES.keys() <= named


@settings(deadline=None, max_examples=300)
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(ends) for name, ends in EXTREMES.items()}), st.data())
def test_any_accepted_extremes_give_a_token_that_the_definition_allows(
    body: dict[str, Any], data: st.DataObject
) -> None:
    values = data.draw(logits())
    params = parse_params(COMPLETIONS, {"prompt": "x", **body})
    sampling = build_sampling(params, GenerationDefaults(eos_token_ids=(0,)), max_tokens=100, seed=params.seed or 0)
    ids = st.integers(0, len(values) - 1)
    prompt, output = data.draw(st.lists(ids, max_size=30)), data.draw(st.lists(ids, max_size=20))
    for choice in sorted({0, sampling.num_choices - 1}):
        asked = SampleInput(sampling.of_choice(choice), len(prompt) + len(output), prompt, output)
        (one,) = sample(torch.from_numpy(values)[None], [asked])
        assert (one.error, one.finite) == (None, True)
        assert 0 <= one.token_id < len(values)
        expected = choose(values, asked)
        assert not expected.is_sure or one.token_id == expected.token_id
        if one.logprobs is not None:
            assert not math.isnan(one.logprobs.logprob)
            assert all(not math.isnan(value) for _, value in one.logprobs.top)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([{"top_k": 1}, {"top_p": 5e-324}, {"min_p": 1}, {"temperature": 5e-324}, {"temperature": 0}]),
    st.integers(0, 2**32),
)
def test_where_nothing_else_is_left_the_likeliest_is_chosen(body: dict[str, Any], seed: int) -> None:
    values = np.random.default_rng(seed).permutation(300).astype(np.float32)  # no two alike
    params = parse_params(COMPLETIONS, {"prompt": "x", "temperature": 1, "seed": seed, **body})
    sampling = build_sampling(params, GenerationDefaults(), max_tokens=1, seed=seed)
    (one,) = sample(torch.from_numpy(values)[None], [SampleInput(sampling, 3, (), ())])
    assert one.token_id == values.argmax()
