"""The first tokens of a prompt's other answers: drawn from the same logits as its first, each with its own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from disagg.engine.batch import Work
from disagg.engine.sampler import Drawn, SampleInput
from disagg.engine.sequence import DecodingSequence, PromptSequence


def draw_others(
    draw: Callable[[torch.Tensor, Sequence[SampleInput]], Drawn], logits: torch.Tensor, pieces: Sequence[Work]
) -> Mapping[PromptSequence | DecodingSequence, Sequence[Drawn]]:
    """Of the prompts among `pieces`, one per row of `logits`, that are answered more than once: one row per answer.

    Row by row, as the logits of all answers at once would be a copy for each.
    """
    return {
        piece.sequence: [draw(logits[[row]], [_input(piece, choice)]) for choice in range(1, _num_choices(piece))]
        for row, piece in enumerate(pieces)
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
