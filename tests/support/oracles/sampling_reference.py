"""What seeded sampling should choose: transformers' logits of the whole answer at once, put through the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from disagg.engine.sampler import SampleInput, sample
from disagg.transceiver.wire.messages.values import Sampling

NOISE = 2e-4
"""Ten times what batch shapes were seen to change a log-probability by here (2e-5)."""
NUM_PERTURBED = 4


def to_sampling(parameters: Mapping[str, Any], *, eos: int) -> Sampling:
    """The request's fields as the sampler reads them."""
    values = dict(parameters)
    values.pop("logprobs", None)
    bias = tuple((int(token), float(amount)) for token, amount in values.pop("logit_bias", {}).items())
    stops = tuple(values.pop("stop_token_ids", ()))
    return Sampling(**values, logit_bias=bias, stop_token_ids=stops, eos_token_ids=(eos,))


def check_answer(model: Any, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> int:
    """Assert that the reference chooses `answer`, up to its first draw so close that noise decides it.

    Returns the number of tokens before that draw: all of them, nearly always.
    """
    rows = _logits(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    inputs = [SampleInput(sampling, len(prompt) + i, prompt, answer[:i]) for i in range(len(answer))]
    chosen = _choose(rows, inputs)
    generator = torch.Generator().manual_seed(0)
    num_safe = len(answer)
    for _ in range(NUM_PERTURBED):
        noise = (torch.rand(rows.shape, generator=generator) * 2 - 1) * NOISE
        pairs = zip(chosen, _choose(rows + noise, inputs), strict=True)
        num_safe = min(num_safe, next((i for i, (a, b) in enumerate(pairs) if a != b), num_safe))
    assert chosen[:num_safe] == list(answer[:num_safe])
    return num_safe


def _choose(rows: torch.Tensor, inputs: Sequence[SampleInput]) -> list[int]:
    return [sampled.token_id for sampled in sample(rows, inputs)]


@torch.inference_mode()
def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([list(ids)])).logits[0].float()
    return logits
