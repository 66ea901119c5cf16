"""What must be promised to a sequence before it starts, and the most that it can come to hold. Slots per pool."""

from __future__ import annotations

from typing import Final

from disagg.cache.admission import Peaks, Promises, peak_slots
from disagg.cache.layout import CacheLayout
from disagg.engine.sequence import LiveSequence, PromptSequence, Request, Reservation, Stage

HEADROOM_BLOCKS: Final = 2
"""An answer is admitted with room for so many more blocks. With less it could be preempted in its first steps, and the
work on its prompt would be lost."""

Promised = PromptSequence | Reservation
"""What stands in the line of admission."""


class PeakSlots:
    """Peaks of requests, and whether empty pools hold them."""

    def __init__(self, layout: CacheLayout, promises: Promises, max_num_batched_tokens: int) -> None:
        self._layout, self._promises, self._max_num_batched_tokens = layout, promises, max_num_batched_tokens

    def of(self, request: Request, *, total_tokens: int, history: int = 0) -> Peaks:
        """The most the request will hold per pool from `history` on; prompt chunks are as long as the budget allows."""
        step = 1 if history else min(self._max_num_batched_tokens, total_tokens)
        return peak_slots(self._layout, total_tokens=total_tokens, history=history, step_tokens=step)

    def at_start(self, sequence: Promised) -> Peaks:
        """What must be promised before the sequence starts."""
        request = sequence.request
        if isinstance(sequence, Reservation):
            total = self.room_for(request, request.num_known)
            return self.of(request, total_tokens=total, history=request.num_known)
        count = len(sequence.token_ids)
        return self.of(request, total_tokens=self.room_for(request, count) if sequence.serves else count)

    def room_for(self, request: Request, num_tokens: int) -> int:
        """Tokens that an answer at `num_tokens` is promised room for: all, if it could not be computed anew."""
        if not self.fit_anew(request):
            return request.total_tokens
        return min(request.total_tokens, num_tokens + HEADROOM_BLOCKS * self._layout.block_size)

    def fit_anew(self, request: Request) -> bool:
        """Whether an empty cache holds all of the request in prompt chunks."""
        return self._promises.fits_empty(self.of(request, total_tokens=request.total_tokens))

    def of_longest(self, max_model_len: int) -> Peaks:
        """Of a prompt as long as any."""
        step = min(self._max_num_batched_tokens, max_model_len)
        return peak_slots(self._layout, total_tokens=max_model_len, history=0, step_tokens=step)

    def beyond(self, sequence: Promised) -> tuple[int, int] | None:
        """(slots needed, slots there are) of the pool that could not hold the sequence even if it were empty."""
        pairs = zip(self._worst(sequence), self._promises.usable, strict=True)
        return next(((need, have) for need, have in pairs if need > have), None)

    def _worst(self, sequence: Promised) -> Peaks:
        """The most the sequence can come to hold if it is never preempted."""
        request = sequence.request
        if isinstance(sequence, Reservation):
            history = 0 if request.sampling.num_choices > 1 else request.num_known  # others may be computed anew
            return self.of(request, total_tokens=request.total_tokens, history=history)
        return self.of(request, total_tokens=request.total_tokens if sequence.serves else request.num_known)


def is_soft(sequence: LiveSequence) -> bool:
    return isinstance(sequence, PromptSequence) and sequence.is_soft


def takes_seat(sequence: Promised) -> bool:
    """Prompts being computed, and reservations, which will be answers. Every answer has a seat."""
    if isinstance(sequence, Reservation):
        return sequence.cached is not None
    return sequence.stage in (Stage.FETCHING, Stage.LANDING, Stage.CHECKING, Stage.COMPUTING)
