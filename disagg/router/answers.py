"""What went to the client of each answer to one prompt, and which of them are over."""

from __future__ import annotations

from collections.abc import Callable

from disagg.router.generation import GenerationEnd, GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.router import Finished
from disagg.transceiver.wire.messages.tokens import Tokens


class AnswersSent:
    """Methods return what goes to the client next, or None. Ask `fault_in` and `fault_in_end` first."""

    def __init__(self, request: GenerationRequest) -> None:
        self._max_tokens, self._prompt_len = request.sampling.max_tokens, len(request.prompt)
        self._counts = [0] * request.sampling.num_choices
        self._ended: set[int] = set()
        self._num_cached_tokens = 0
        self.num_tokens = 0
        """Of all answers."""

    @property
    def count(self) -> int:
        """Answers that there will be."""
        return len(self._counts)

    @property
    def is_over(self) -> bool:
        return len(self._ended) == len(self._counts)

    def check_invariants(self) -> None:
        assert max(self._counts) <= self._max_tokens
        assert self.num_tokens == sum(self._counts)

    def fault_in(self, message: Tokens) -> str | None:
        """Why no honest worker says this now; an answer that the client ended may go on for a while."""
        if not 0 <= message.choice < len(self._counts):
            return f"tokens of choice {message.choice} came, {len(self._counts)} were asked for"
        next_index = self._counts[message.choice]
        if not 0 <= message.index <= next_index and message.choice not in self._ended:
            return f"token {message.index} came where {next_index} was next"
        if message.index + len(message.token_ids) > self._max_tokens:
            return f"more than max_tokens = {self._max_tokens} tokens came"
        if message.logprobs and len(message.logprobs) != len(message.token_ids):
            return f"{len(message.token_ids)} tokens came with {len(message.logprobs)} logprobs"
        if not 0 <= message.num_cached_tokens <= self._prompt_len:
            return f"{message.num_cached_tokens} of {self._prompt_len} prompt tokens were cached"
        return None

    def add(self, message: Tokens, scores: Callable[[], tuple[PromptLogprobs, ...]]) -> TokenChunk | None:
        """The tokens of the message that were not sent before. `scores`: what goes out with the first token of all."""
        choice, index = message.choice, self._counts[message.choice]
        token_ids, logprobs = message.token_ids[index - message.index :], message.logprobs[index - message.index :]
        if not token_ids or choice in self._ended:
            return None
        if not self.num_tokens:
            self._num_cached_tokens = message.num_cached_tokens
        num_cached = 0 if index else self._num_cached_tokens
        chunk = TokenChunk(index, token_ids, logprobs, num_cached, () if self.num_tokens else scores(), choice)
        self._counts[choice] += len(token_ids)
        self.num_tokens += len(token_ids)
        return chunk

    def next_chunk(self, message: Tokens) -> TokenChunk | None:
        """As `add`, for the plain case that almost all tokens are; None, with nothing done, where it is not that."""
        choice, token_ids = message.choice, message.token_ids
        if not 0 <= choice < len(self._counts) or choice in self._ended:
            return None
        index = self._counts[choice]
        end = index + len(token_ids)
        if not index or not token_ids or message.index != index or message.num_cached_tokens or end > self._max_tokens:
            return None
        if message.logprobs and len(message.logprobs) != len(token_ids):
            return None
        self._counts[choice] = end
        self.num_tokens += len(token_ids)
        return TokenChunk(index, token_ids, message.logprobs, choice=choice)

    def fault_in_end(self, message: Finished) -> str | None:
        count = self._counts[message.choice] if 0 <= message.choice < len(self._counts) else -1
        is_right = message.index == count and message.reason in ("stop", "length")
        if is_right or message.choice in self._ended:
            return None
        return f"finished ({message.reason}) at token {message.index} of choice {message.choice}, {count} came"

    def finish(self, message: Finished) -> GenerationEnd | None:
        if not self.end(message.choice):
            return None
        return GenerationEnd(message.reason, message.stop_token_id, self._num_cached_tokens, message.choice)

    def end(self, choice: int) -> bool:
        """Nothing more of this answer goes out. Returns whether it was not over before."""
        is_new = choice not in self._ended
        self._ended.add(choice)
        return is_new


def true_status(status: int) -> int:
    """A worker's status as the client may see it: an error, whatever the worker said."""
    return status if 400 <= status <= 599 else 500
