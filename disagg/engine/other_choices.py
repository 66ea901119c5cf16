"""The first tokens of a prompt's other answers: sampled from the same logits as its first, each with its own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from disagg.engine.batch import Work
from disagg.engine.commands import AttemptKey
from disagg.engine.sampler import Sampled, SampleInput, sample
from disagg.engine.sequence import PromptSequence

Others = Sequence[Sampled]
"""Of the second answer, the third and so on."""


def sample_others(logits: torch.Tensor, work: Sequence[Work]) -> Mapping[AttemptKey, Others]:
    """Of the prompts that end in this step and are answered more than once; `logits` as for `sample`.

    One row at a time, as a prompt is answered by few and its logits would be copied for each.
    """
    ending = [piece for piece in work if piece.wants_logits]
    return {
        piece.sequence.key: [sample(row[None], [_input(piece, choice)])[0] for choice in range(1, _num_choices(piece))]
        for piece, row in zip(ending, logits, strict=True)
        if _num_choices(piece) > 1
    }


def _num_choices(piece: Work) -> int:
    """An answer that goes on, or is computed anew, is one of its own."""
    sequence = piece.sequence
    is_new = isinstance(sequence, PromptSequence) and sequence.answer is None
    return sequence.request.sampling.num_choices if is_new else 1


def _input(piece: Work, choice: int) -> SampleInput:
    request = piece.sequence.request
    return SampleInput(request.sampling.of_choice(choice), piece.end, request.prompt, (), None)
