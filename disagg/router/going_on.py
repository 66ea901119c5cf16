"""Whether an answer goes on when its worker is lost in the middle of it, and whether its tokens stay equal. Pure.

What the client has is computed again with the prompt, and the next token is sampled from the same seed at the same
position. Its tokens are those of an answer that was never interrupted, up to near ties of the logits, where all KV was
stored in one format before and after. Placing prefers workers of that format; elsewhere the answer goes on *inexact*.
"""

from __future__ import annotations

from typing import Final

from disagg.router.choose import Placement
from disagg.router.pairing import KvFormat, kv_format

MAX_CONTINUATIONS: Final = 8
"""By default. Each is a worker that died or gave up in the middle of one answer: with more of them the fault is not
with the workers, and each costs the computation of all there is."""


class GoingOn:
    """Of one request. `most`: how often it may, 0 where a loss ends an answer that has begun."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self._formats: set[KvFormat] = set()

    @property
    def is_spent(self) -> bool:
        return self.count >= self.most

    @property
    def told(self) -> str:
        """What a client is told beside the reason of the end."""
        return f" ({self.count} of {self.most} continuations used)" if self.most else ""

    def note(self, placement: Placement) -> None:
        """Tokens of this attempt reached the client."""
        self._formats |= _formats_of(placement)

    @property
    def only_format(self) -> KvFormat | None:
        """In which all KV behind the answer was stored; None where there were several."""
        return next(iter(self._formats)) if len(self._formats) == 1 else None

    def is_exact(self, placement: Placement) -> bool:
        """Whether the KV behind the next tokens is what it would have been."""
        return len(self._formats | _formats_of(placement)) <= 1


def _formats_of(placement: Placement) -> set[KvFormat]:
    targets = (placement.server, placement.prefill)
    return {kv_format(target.geometry) for target in targets if target is not None and target.geometry is not None}
