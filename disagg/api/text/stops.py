"""Stop strings, found wherever tokens split them; text that may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string completes; the string that completes first wins, the longer one on a tie.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that no stop string can take back. Sets `matched`, after which nothing may be pushed.

        `may_stop` false: a stop string that completes in this text is text (`min_tokens`).
        """
        assert self.matched is None
        if not self._stops:
            return text
        num_held = len(self._held)
        text = self._held + text
        if may_stop and (found := self._find(text, num_held)):
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        cut = self._safe_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held for a stop string that never came."""
        text, self._held = self._held, ""
        return text

    def _find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """Start and text of the first to complete after the first `num_old` characters."""
        hits = [(text.find(stop, max(0, num_old + 1 - len(stop))), stop) for stop in self._stops]
        hits = [(start, stop) for start, stop in hits if start >= 0]
        return min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)

    def _safe_length(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop string."""
        return min((_overlap_start(text, stop) for stop in self._stops), default=len(text))


def _overlap_start(text: str, stop: str) -> int:
    start = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) if start < 0 else start
