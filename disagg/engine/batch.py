"""What one step computes: pieces of sequences, and how prompts share the token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg.cache.cache import CachedSequence
from disagg.engine.run.scoring import Scoring
from disagg.engine.sequence import DecodingSequence, PromptSequence


@dataclass(frozen=True, slots=True)
class Work:
    """`token_ids` of one sequence at positions from `start`, its blocks already sized for them.

    `cached`: the blocks that the sequence held when this was scheduled. Once it holds others, or none, the result is of
    no use to it.
    """

    sequence: PromptSequence | DecodingSequence
    token_ids: tuple[int, ...]
    start: int
    scoring: Scoring | None = None
    """Takes the log-probabilities of the prompt's tokens behind these, where they are asked for."""
    cached: CachedSequence | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cached", self.sequence.cached)

    @property
    def is_current(self) -> bool:
        """Whether the sequence holds what it held then: it was not released, dropped, preempted or begun anew."""
        return self.sequence.cached is self.cached and self.cached is not None and self.cached.is_open

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def wants_logits(self) -> bool:
        """Decode always; of a prompt only the chunk that ends it."""
        return isinstance(self.sequence, DecodingSequence) or self.end == len(self.sequence.token_ids)


def scoring_of(prompt: PromptSequence, start: int, end: int) -> Scoring | None:
    """What the chunk at positions [start, end) is to score; None: nothing. The prompt's first token has no score."""
    num_top = prompt.request.sampling.num_prompt_logprobs
    targets = prompt.token_ids[start + 1 : end + 1]
    return Scoring(start + 1, targets, num_top) if prompt.is_scored and num_top is not None and targets else None


def share_tokens(remaining: Sequence[int], budget: int, max_chunks: int) -> list[int]:
    """How many tokens of each prompt, oldest first, the next step computes; at most `max_chunks` get any.

    The oldest is sure of half the budget, so it ends after so many steps whatever arrives behind it. The others share
    the rest, nearest to their end first; what is left over goes to the oldest.
    """
    shares = [0] * len(remaining)
    if not remaining or budget < 1 or max_chunks < 1:
        return shares
    shares[0] = min(remaining[0], (budget + 1) // 2)
    left = budget - shares[0]
    for index in sorted(range(1, len(remaining)), key=lambda i: (remaining[i], i))[: max_chunks - 1]:
        shares[index] = min(remaining[index], left)
        left -= shares[index]
    shares[0] = min(remaining[0], shares[0] + left)
    return shares
