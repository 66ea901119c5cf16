"""The log-probabilities of one prompt as a worker reports them, whole before the first token goes to the client."""

from __future__ import annotations

from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs


class ReportedScores:
    """Of a prompt of `prompt_len` tokens, the first of which has none. `num_top` None: none are asked for."""

    def __init__(self, prompt_len: int, num_top: int | None) -> None:
        self._prompt_len, self._num_top = prompt_len, num_top
        self._parts: list[PromptLogprobs] = []

    @property
    def is_complete(self) -> bool:
        return self._num_top is None or self._next == self._prompt_len

    @property
    def parts(self) -> tuple[PromptLogprobs, ...]:
        return tuple(self._parts)

    def restart(self) -> None:
        """Another attempt computes the prompt."""
        self._parts.clear()

    def add(self, scores: PromptLogprobs) -> str | None:
        """Keep what is new; what repeats earlier positions is dropped. Returns what is wrong with it, or None."""
        if self._num_top is None or scores.num_top > self._num_top or scores.end > self._prompt_len:
            return f"log-probabilities of prompt tokens {scores.start} to {scores.end - 1} came unasked"
        if scores.start > self._next:
            return f"log-probabilities of prompt token {scores.start} came where {self._next} was next"
        if scores.end > self._next:
            self._parts.append(scores.from_position(self._next))
        return None

    @property
    def _next(self) -> int:
        return self._parts[-1].end if self._parts else 1
