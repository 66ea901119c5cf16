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
    """The tokens of each prompt among `pieces` that has several answers: one per answer but the first.

    `pieces` has one entry per row of `logits`. Rows are drawn one by one, since a single call would need a copy of the
    logits for each answer.
    """
    return {
        piece.sequence: [draw(logits[[row]], [_input(piece, choice)]) for choice in range(1, _num_choices(piece))]
        for row, piece in enumerate(pieces)
        if _num_choices(piece) > 1
    }


def _num_choices(piece: Work) -> int:
    """An answer that goes on, or is computed anew, is alone by then."""
    sequence = piece.sequence
    is_new = isinstance(sequence, PromptSequence) and sequence.answer is None
    return sequence.request.sampling.num_choices if is_new else 1


def _input(piece: Work, choice: int) -> SampleInput:
    request = piece.sequence.request
    return SampleInput(request.sampling.of_choice(choice), piece.end, request.prompt, (), None)
