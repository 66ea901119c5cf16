"""Where the next attempt of a request goes, after those that failed. Pure: the fleet of the moment is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from disagg.router.answers import AnswersSent
from disagg.router.choose import Placement, Unplaceable
from disagg.router.going_on import GoingOn
from disagg.router.placer import Placer
from disagg.transceiver.wire.messages.router import PeerTarget

Taken = frozenset[str]
"""Workers that are not to be given this request now."""


class NextPlace:
    """Of one request. Servers that failed get it no more; prefill workers that did only where there is no other."""

    def __init__(self, placer: Callable[[], Placer], max_tokens: int, answers: AnswersSent, going_on: GoingOn) -> None:
        self._placer, self._max_tokens, self._answers, self._going_on = placer, max_tokens, answers, going_on
        self.failed_prefills: set[str] = set()
        self.failed_servers: set[str] = set()

    def first(self) -> Placement | Unplaceable:
        return self._placer().place(self._max_tokens)

    def anew(self, taken: Taken) -> Placement | Unplaceable:
        """Both sides. Where a transfer failed is the second choice: that may have been the server's fault."""
        placer, fallback = self._placer(), self.failed_servers | taken
        excludes = (
            tried | unfit for unfit in self._unfit(placer) for tried in (fallback | self.failed_prefills, fallback)
        )
        return _first_placed(self._placed(placer, frozenset(exclude)) for exclude in excludes)

    def other_prefill(self, server: PeerTarget, taken: Taken) -> PeerTarget | None:
        """Another prefill worker for a server that has reserved its room."""
        placer, tried = self._placer(), self.failed_prefills | taken
        found = (placer.prefill_for(server.incarnation, frozenset(tried | unfit)) for unfit in self._unfit(placer))
        return next((target for target in found if target is not None), None)

    def _unfit(self, placer: Placer) -> Iterable[frozenset[str]]:
        """For an answer that goes on: at first all that would make it inexact, then those that cannot do it at all."""
        if not self._answers.num_tokens:
            return (frozenset(),)
        return dict.fromkeys((placer.unfit(self._going_on.only_format), placer.unfit(None)))

    def _placed(self, placer: Placer, exclude: frozenset[str]) -> Placement | Unplaceable:
        """An answer that goes on is placed as a prompt of that length. Where several do, or no pair is there, a worker
        that decodes computes all of it itself: a transfer ends in one answer.
        """
        answers = self._answers
        if not answers.num_tokens:
            return placer.place(self._max_tokens, exclude)
        placed = placer.place(answers.most_left, exclude) if answers.count == 1 else None
        return placed if isinstance(placed, Placement) else placer.alone(exclude)


def _first_placed(tries: Iterable[Placement | Unplaceable]) -> Placement | Unplaceable:
    """The first that is one; else why the last was not."""
    last: Placement | Unplaceable | None = None
    for last in tries:
        if isinstance(last, Placement):
            return last
    assert last is not None, "nothing was tried"
    return last
