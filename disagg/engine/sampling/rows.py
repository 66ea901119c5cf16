"""What one row of a step's logits is to be sampled by, in numbers that every implementation reads alike.

1. *Adjust*, in float64 and only where asked for: masked ids become -inf, biases are added, the repetition penalty
   divides what is above 0 and multiplies the rest (saturating at the largest float64), then count * frequency +
   presence is subtracted. Without an adjustment a logit is its own.
2. *Greedy*: the first of the largest.
3. Else *score* = (logit - largest) * inverse temperature, rounded to float32 once. No score is above 0, and the bits of
   its magnitude, its *key*, order scores as whole numbers: 0 for the likeliest. An inverse below 2**-20 is raised until
   the furthest score is at -2**-40: no chance changes that a float could tell, and the order of logits stays.
4. *Filter*, each on what the one before left: keys up to that of `least` (min-p); up to the `top_k`-th, ties with it
   included; the fewest, in order of key and id, whose weights reach ceil(top_p * sum). A weight is exp(score) * 2**30,
   a whole number by one stated polynomial, so sums are exact in any order. Key 0 passes every filter.
5. *Draw* the largest of score + Gumbel noise, of equal ones the first; noise belongs to (seed, position, id).

Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from disagg.engine.sampling.seen import SeenTokens
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

LEAST_TEMPERATURE: Final = 2.0**-126
"""The smallest normal float32: what is divided by less is decided by the largest logit alone, so it is greedy."""

NO_IDS: Final[Int64] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class SampleInput:
    """`position`: absolute position of the token to be chosen. `prompt`, `output`: the sequence's ids so far.

    `seen` is the sequence's own, kept from token to token; without it prompt and output are counted anew.
    """

    sampling: Sampling
    position: int
    prompt: Sequence[int]
    output: Sequence[int]
    seen: SeenTokens | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Sampled:
    """`finite` False: the row's logits held NaN or infinity. `error`: why this row could not be sampled.

    In both cases `token_id` means nothing.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    finite: bool
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """`seen` bit i: the repetition penalty applies to id i; None = to none. `counts[i]`: how often `used[i]` came."""

    masked: Int64
    bias_ids: Int64
    biases: Float64
    seen: npt.NDArray[np.uint64] | None
    repetition: float
    used: Int64
    counts: Int64
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True)
class SampleRow:
    """`inverse_temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `least` -inf are off, `num_logprobs` -1 is none."""

    position: int
    seed: int
    inverse_temperature: float
    top_k: int
    top_p: float
    least: float
    num_logprobs: int
    adjustments: Adjustments | None


GREEDY: Final = SampleRow(0, 0, 0.0, 0, 1.0, -math.inf, -1, None)


def plan_row(given: SampleInput, vocab_size: int) -> SampleRow:
    """Costs what the request lists (biases, stops), not the vocabulary; with `given.seen` not the prompt either."""
    sampling = given.sampling
    count = -1 if sampling.num_logprobs is None else min(sampling.num_logprobs, vocab_size)
    return SampleRow(
        position=given.position,
        seed=sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
        inverse_temperature=0.0 if sampling.temperature < LEAST_TEMPERATURE else 1 / sampling.temperature,
        top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        top_p=sampling.top_p,
        least=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
        num_logprobs=count,
        adjustments=_adjustments(given, vocab_size) if _is_adjusted(given) else None,
    )


def _is_adjusted(given: SampleInput) -> bool:
    sampling = given.sampling
    return is_penalised(sampling) or bool(sampling.logit_bias) or len(given.output) < sampling.min_tokens


def is_penalised(sampling: Sampling) -> bool:
    """Whether a token's chance depends on those before it."""
    return sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


def _adjustments(given: SampleInput, vocab_size: int) -> Adjustments:
    sampling = given.sampling
    biases = [(token_id, bias) for token_id, bias in sampling.logit_bias if 0 <= token_id < vocab_size]
    seen = _seen(given, vocab_size)
    repeats = sampling.repetition_penalty != 1
    counts_output = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    return Adjustments(
        masked=_masked(given, vocab_size),
        bias_ids=np.array([token_id for token_id, _ in biases], np.int64),
        biases=np.array([bias for _, bias in biases], np.float64),
        seen=seen.bits if seen is not None and repeats else None,
        repetition=sampling.repetition_penalty,
        used=seen.used if seen is not None and counts_output else NO_IDS,
        counts=seen.counts if seen is not None and counts_output else NO_IDS,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
    )


def _masked(given: SampleInput, vocab_size: int) -> Int64:
    """Stops that may not come yet. A client may list the whole vocabulary; something must be chosen."""
    sampling = given.sampling
    if len(given.output) >= sampling.min_tokens:
        return NO_IDS
    stops = {i for i in (*sampling.eos_token_ids, *sampling.stop_token_ids) if 0 <= i < vocab_size}
    return np.array(sorted(stops), np.int64) if len(stops) < vocab_size else NO_IDS


def _seen(given: SampleInput, vocab_size: int) -> SeenTokens | None:
    if not is_penalised(given.sampling):
        return None
    seen = SeenTokens() if given.seen is None else given.seen
    seen.follow(given.prompt, given.output, vocab_size)
    return seen
