"""Whether an answer goes on when its worker is lost in the middle of it, and whether its tokens stay equal. Pure.

What the client has is computed again with the prompt, and the next token is sampled from the same seed at the same
position. Its tokens are those of an answer that was never interrupted, up to near ties of the logits, where all KV was
stored in one format before and after. Placing prefers workers of that format; elsewhere the answer goes on *inexact*.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        self._spoken: list[Placement] = []

    @property
    def is_spent(self) -> bool:
        return self.count >= self.most

    @property
    def told(self) -> str:
        """What a client is told beside the reason of the end."""
        return f" ({self.count} of {self.most} continuations used)" if self.most else ""

    def note(self, placement: Placement) -> None:
        """Tokens of this attempt reached the client."""
        self._spoken.append(placement)

    @property
    def only_format(self) -> KvFormat | None:
        """In which all KV behind the answer was stored; None where there were several."""
        formats = _formats_of(self._spoken)
        return formats.pop() if len(formats) == 1 else None

    def is_exact(self, placement: Placement) -> bool:
        """Whether the KV behind the next tokens is what it would have been."""
        return not self._spoken or len(_formats_of([*self._spoken, placement])) <= 1


def _formats_of(placements: Iterable[Placement]) -> set[KvFormat]:
    """Made when an answer goes on, and not for each request: scales are thousands of numbers."""
    targets = [target for placement in placements for target in (placement.server, placement.prefill)]
    return {kv_format(target.geometry) for target in targets if target is not None and target.geometry is not None}
