"""A step that was launched and whose tokens the host has not read: what decides on them waits until they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg.engine.batch import Work
from disagg.engine.run.runner import Chunk
from disagg.engine.sampler import Drawn, SampleInput
from disagg.engine.sequence import UNKNOWN, DecodingSequence, PromptSequence


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """`rows`: which row of `drawn` holds the token of a sequence. Those that ended meanwhile have none."""

    work: Sequence[Work]
    drawn: Drawn
    rows: Mapping[PromptSequence | DecodingSequence, int]
    others: Mapping[PromptSequence | DecodingSequence, Sequence[Drawn]]
    """For prompts with several answers: the first tokens of the second answer, the third and so on."""

    @property
    def holds_up(self) -> bool:
        """Whether a prompt goes on after this step: a step launched behind it would leave the next chunk out."""
        return any(not piece.wants_logits for piece in self.work)


def chunk_of(piece: Work, before: Flight | None) -> Chunk:
    """What the runner is given; a token that the step `before` draws is named by its row there."""
    cached = piece.sequence.cached
    assert cached is not None
    token_ids: tuple[int, ...] = piece.token_ids
    if token_ids[0] == UNKNOWN:
        assert before is not None
        token_ids = (-1 - before.rows[piece.sequence],)
    wanted = piece.wants_logits
    return Chunk(cached.tables, token_ids, piece.start, wanted, cached.scratch, piece.scoring, cached)


def sample_input(piece: Work) -> SampleInput:
    """The token to choose stands right after the piece. All before it are known."""
    request, sequence = piece.sequence.request, piece.sequence
    answer = sequence.answer if isinstance(sequence, PromptSequence) else sequence
    output = answer.output if answer is not None else request.emitted
    return SampleInput(request.sampling, piece.end, request.prompt, output, request.seen)
