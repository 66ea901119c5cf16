"""One choice as it grows: tokens in, text out, with everything that decides where the text ends."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.api.text.detokenizer import Detokenizer
from disagg.api.text.stops import StopMatcher
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A generated token; its text begins at `text_offset` characters of the answer."""

    token_id: int
    logprobs: TokenLogprobs | None
    text_offset: int


@dataclass(frozen=True, slots=True)
class Finish:
    """`reason` is `stop` or `length`; `stop_reason` is the stop string or requested stop token that ended it."""

    reason: str
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to a choice. Text may come later than its tokens: it waits until nothing can take it back."""

    text: str = ""
    tokens: tuple[AnswerToken, ...] = ()
    finish: Finish | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class Answer:
    """Feed it what the backend yields, in order, until a delta carries `finish`; then close the backend's iterator.

    The text does not depend on how tokens are grouped into chunks. A token that may end the answer is `_parked` until
    the next item says whether it did: what ends an answer leaves no text (unless `include_stop`).
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        sampling: Sampling,
        *,
        include_stop: bool,
        is_empty: bool = False,
    ) -> None:
        """`is_empty`: nothing was asked for but what is known of the prompt; the one token generated is left out."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._sampling = sampling
        self._include_stop = include_stop
        self._is_empty = is_empty
        self._ending_ids = set(sampling.stop_token_ids) | set(() if sampling.ignore_eos else sampling.eos_token_ids)
        self._parked: int | None = None
        self._text_length = 0
        self.num_tokens = 0
        self.num_cached_tokens = 0

    def feed(self, item: TokenChunk | GenerationEnd) -> Delta:
        """Raises RuntimeError when tokens repeat or are missing: a wrong answer must not pass for a right one."""
        if isinstance(item, GenerationEnd):
            return self._end(item)
        if self._is_empty:
            self.num_cached_tokens = max(self.num_cached_tokens, item.num_cached_tokens)
            return Delta(prompt_logprobs=item.prompt_logprobs)
        if item.index != self.num_tokens:
            raise RuntimeError(f"the backend sent token {item.index}, expected token {self.num_tokens}")
        return self._add(item)

    def _add(self, chunk: TokenChunk) -> Delta:
        text, tokens = "", []
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        for i, token_id in enumerate(chunk.token_ids):
            text += self._unpark()
            if self._stops.matched is None:
                tokens.append(AnswerToken(token_id, chunk.logprobs[i] if chunk.logprobs else None, self._text_length))
                self.num_tokens += 1
                text += self._place(token_id)
            if self._stops.matched is not None:  # what follows in this chunk is not part of the answer
                return Delta(text, tuple(tokens), Finish("stop", self._stops.matched), chunk.prompt_logprobs)
        return Delta(text, tuple(tokens), None, chunk.prompt_logprobs)

    def _place(self, token_id: int) -> str:
        if token_id in self._ending_ids:
            self._parked = token_id
            return ""
        return self._spell(token_id)

    def _unpark(self) -> str:
        token_id, self._parked = self._parked, None
        return "" if token_id is None else self._spell(token_id)

    def _spell(self, token_id: int) -> str:
        return self._pass(self._detokenizer.push(token_id))

    def _pass(self, text: str) -> str:
        self._text_length += len(text)
        return self._stops.push(text, may_stop=self.num_tokens > self._sampling.min_tokens)

    def _end(self, end: GenerationEnd) -> Delta:
        self.num_cached_tokens = max(self.num_cached_tokens, end.num_cached_tokens)
        if self._is_empty:
            return Delta(finish=Finish("length"))
        text = self._unpark() if self._include_stop or end.reason != "stop" else ""
        if self._stops.matched is None:
            text += self._pass(self._detokenizer.flush())
        if self._stops.matched is not None:
            return Delta(text, (), Finish("stop", self._stops.matched))
        requested = end.stop_token_id if end.stop_token_id in self._sampling.stop_token_ids else None
        return Delta(text + self._stops.flush(), (), Finish(end.reason, requested))
