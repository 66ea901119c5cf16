"""What each worker has been given and not finished, by the router's own count: never old, unlike a lease."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from disagg.router.choose import Placement

FIRST_GUESS: Final = 128
"""Tokens of an answer before any has ended: it only decides how much a place beside others counts against a queue."""

KEPT: Final = 0.98
"""What is left of an answer's weight in the mean when another ended: the last fifty count."""


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's part of one request: tokens of its prompt still to be computed there, answers to be decoded there."""

    incarnation: str
    num_prompt_tokens: int = 0
    num_answers: int = 0


def shares_of(placement: Placement, num_prompt_tokens: int, num_answers: int, *, has_begun: bool) -> tuple[Share, ...]:
    """Of a request placed so; `has_begun`: its first token came."""
    server, prefill = placement.server.incarnation, placement.prefill
    if has_begun:
        return (Share(server, num_answers=num_answers),)
    to_compute = placement.way.start.num_computed if placement.way is not None else num_prompt_tokens
    if prefill is None:
        return (Share(server, to_compute),)
    return (Share(server, num_answers=num_answers), Share(prefill.incarnation, to_compute))


class Workload:
    """Sums of the shares of live requests, and how long answers are."""

    def __init__(self) -> None:
        self.prompt_tokens: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._weight = self._tokens = 0.0

    def move(self, before: Iterable[Share], after: Iterable[Share]) -> None:
        """One request went on: it had the shares `before`, and has those `after`."""
        for share in after:
            self._add(share, 1)
        for share in before:
            self._add(share, -1)

    def note_answer(self, num_tokens: int) -> None:
        """An answer ended with so many tokens."""
        self._weight, self._tokens = KEPT * self._weight + 1, KEPT * self._tokens + num_tokens

    @property
    def mean_answer(self) -> float:
        return self._tokens / self._weight if self._weight else float(FIRST_GUESS)

    def check_invariants(self, shares: Iterable[Share]) -> None:
        """`shares`: those of all live requests."""
        again = Workload()
        again.move((), shares)
        assert (self.prompt_tokens, self.answers) == (again.prompt_tokens, again.answers)

    def _add(self, share: Share, sign: int) -> None:
        amounts = ((self.prompt_tokens, share.num_prompt_tokens), (self.answers, share.num_answers))
        for counter, amount in amounts:
            if amount:
                counter[share.incarnation] += sign * amount
                if not counter[share.incarnation]:
                    del counter[share.incarnation]
