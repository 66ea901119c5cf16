"""Sampling: filters and penalties against plain definitions, draws against frequencies, rows against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from disagg.engine.sampler import Sampled, SampleInput, sample
from disagg.transceiver.wire.messages.values import Sampling

VOCAB = 50


def row(
    position: int = 7, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **options: object
) -> SampleInput:
    sampling = Sampling(**{"max_tokens": 100, "temperature": 0.0, **options})  # type: ignore[arg-type]
    return SampleInput(sampling, position, prompt, output)


def logits_of(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def choose(logits: torch.Tensor, given: SampleInput) -> int:
    (one,) = sample(logits, [given])
    assert one.finite
    return one.token_id


def drawn(logits: torch.Tensor, num_draws: int = 300, **options: object) -> set[int]:
    return {choose(logits, row(position, temperature=1.0, **options)) for position in range(num_draws)}


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert choose(logits_of(1, 3, 2, 3), row()) == 1


def test_draws_follow_the_softmax_at_the_given_temperature() -> None:
    logits = torch.linspace(-1, 2, 8)[None]
    draws = np.array([choose(logits, row(p, temperature=0.7, seed=3)) for p in range(4000)])
    expected = (logits[0] / 0.7).softmax(-1).numpy()
    frequencies = np.bincount(draws, minlength=8) / len(draws)
    assert np.abs(frequencies - expected).max() < 0.03  # four standard deviations at p = 1/2


def test_the_token_is_a_function_of_seed_and_position() -> None:
    logits = torch.zeros(1, VOCAB)
    first = [choose(logits, row(p, temperature=1.0, seed=1)) for p in range(20)]
    assert first == [choose(logits, row(p, temperature=1.0, seed=1)) for p in range(20)]
    assert first != [choose(logits, row(p, temperature=1.0, seed=2)) for p in range(20)]
    assert len(set(first)) > 5


def test_a_row_gives_the_same_token_in_any_batch() -> None:
    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0))
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 2.0, "num_logprobs": 3}]
    inputs = [row(i, **kinds[i % 3], seed=i) for i in range(16)]
    together = sample(logits, inputs)
    assert together == [sample(logits[i : i + 1], inputs[i : i + 1])[0] for i in range(16)]
    assert together[::-1] == sample(logits.flip(0), inputs[::-1])


def test_top_k_leaves_the_k_likeliest_and_ties() -> None:
    assert drawn(logits_of(1.0, 1.2, 0.9, 1.1), top_k=2) == {1, 3}
    assert drawn(logits_of(1.0, 1.0, 0.9, 1.1), top_k=2) == {0, 1, 3}
    assert drawn(logits_of(1.0, 1.2), top_k=9) == {0, 1}


def test_top_p_leaves_the_least_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert drawn(logits, top_p=0.79) == {0, 1}
    assert drawn(logits, top_p=0.81) == {0, 1, 2}
    assert drawn(logits, top_p=1e-9) == {0}


def test_min_p_leaves_what_is_likely_enough_beside_the_best() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert drawn(logits, min_p=0.5) == {0, 1}
    assert drawn(logits, min_p=1.0) == {0}


def test_min_p_comes_before_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # Of the two that min-p leaves, the first has 0.625: top-p 0.6 is satisfied by it alone, where 0.5 would not be.
    assert drawn(logits, min_p=0.5, top_p=0.6) == {0}


def test_a_filter_does_not_change_which_of_the_kept_is_drawn() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    for position in range(50):
        free = choose(logits, row(position, temperature=1.0))
        if free in logits[0].topk(5).indices:
            assert choose(logits, row(position, temperature=1.0, top_k=5)) == free


def test_logit_bias_is_added() -> None:
    assert choose(logits_of(1, 2, 3), row(logit_bias=((0, 2.5), (99, 1.0)))) == 0
    assert choose(logits_of(1, 2, 3), row(logit_bias=((2, -100.0),))) == 1


def test_repetition_penalty_counts_prompt_and_output_once() -> None:
    assert choose(logits_of(2.0, 1.9, -1.0), row(prompt=(0, 0, 0), repetition_penalty=1.1)) == 1
    assert choose(logits_of(2.0, 1.9, -1.0), row(output=(0,), repetition_penalty=1.04)) == 0
    assert choose(logits_of(-1.0, -1.05), row(output=(0,), repetition_penalty=1.1)) == 1


def test_frequency_and_presence_penalties_count_the_output_alone() -> None:
    assert choose(logits_of(2.0, 1.0), row(prompt=(0, 0), presence_penalty=1.5, frequency_penalty=1.5)) == 0
    assert choose(logits_of(2.0, 1.0), row(output=(0,), presence_penalty=1.1)) == 1
    assert choose(logits_of(2.0, 1.0), row(output=(0,), frequency_penalty=0.6)) == 0
    assert choose(logits_of(2.0, 1.0), row(output=(0, 0), frequency_penalty=0.6)) == 1


def test_stop_tokens_are_out_of_reach_until_min_tokens() -> None:
    options = {"min_tokens": 2, "eos_token_ids": (0,), "stop_token_ids": (1,)}
    assert choose(logits_of(3, 2, 1), row(**options)) == 2
    assert choose(logits_of(3, 2, 1), row(output=(2,), **options)) == 2
    assert choose(logits_of(3, 2, 1), row(output=(2, 2), **options)) == 0


def test_a_stop_list_that_covers_the_vocabulary_is_no_bar() -> None:
    options = {"min_tokens": 2, "stop_token_ids": (0, 1, 2), "eos_token_ids": (2, -5, 99)}
    assert choose(logits_of(3, 2, 1), row(**options)) == 0
    assert drawn(logits_of(3, 2, 1), **options) == {0, 1, 2}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(1, 2, 3, 3)
    raw = logits[0].log_softmax(-1)
    (one,) = sample(logits, [row(temperature=0.1, top_k=1, logit_bias=((0, 50.0),), num_logprobs=3)])
    assert one.token_id == 0
    assert one.logprobs is not None
    assert one.logprobs.logprob == pytest.approx(float(raw[0]))
    assert [token for token, _ in one.logprobs.top] == [2, 3, 1]
    assert one.logprobs.top[0][1] == pytest.approx(float(raw[2]))


def test_logprobs_can_be_absent_or_the_chosen_tokens_alone() -> None:
    assert sample(logits_of(1, 2), [row()])[0].logprobs is None
    alone = sample(logits_of(1, 2), [row(num_logprobs=0)])[0].logprobs
    assert alone is not None
    assert alone.top == ()
    assert alone.logprob == pytest.approx(-math.log1p(math.exp(-1)))
    every = sample(logits_of(1, 2), [row(num_logprobs=20)])[0].logprobs
    assert every is not None
    assert len(every.top) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_is_reported_and_harms_no_other(bad: float) -> None:
    logits = torch.tensor([[1.0, 2.0], [1.0, bad], [3.0, 2.0]])
    inputs = [row(), row(temperature=1.0), row()]
    assert sample(logits, inputs) == [
        Sampled(1, None, finite=True),
        Sampled(0, None, finite=False),
        Sampled(0, None, finite=True),
    ]


def test_nothing_in_gives_nothing_out() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


def test_the_logits_given_are_left_alone() -> None:
    logits = logits_of(1, 2, 3)
    choose(logits, row(temperature=1.0, logit_bias=((0, 5.0),), top_k=1))
    assert logits.tolist() == [[1, 2, 3]]
