"""What went to the client of each answer to one prompt, and which of them are over."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import cast

from disagg.router.generation import GenerationEnd, GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.router import Finished
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, Tokens
from disagg.transceiver.wire.schema import PackedInts


class AnswersSent:
    """Methods return what goes to the client next, or None. Ask `fault_in` and `fault_in_end` first."""

    def __init__(self, request: GenerationRequest) -> None:
        self._sampling, self._prompt_len = request.sampling, len(request.prompt)
        self._max_tokens = request.sampling.max_tokens
        self._ids = [array("i") for _ in range(request.sampling.num_choices)]
        """What went out of each, in 4 bytes a token: with it an answer goes on elsewhere when its worker dies."""
        self._ended: set[int] = set()
        self._num_cached_tokens = 0
        self.num_tokens = 0
        """Of all answers."""

    @property
    def count(self) -> int:
        """Answers that there will be."""
        return len(self._ids)

    @property
    def num_open(self) -> int:
        """Answers that are not over."""
        return len(self._ids) - len(self._ended)

    @property
    def is_over(self) -> bool:
        return not self.num_open

    @property
    def most_left(self) -> int:
        """The most tokens that any open answer can still have."""
        return self._max_tokens - min(len(self._ids[choice]) for choice in self._open)

    @property
    def _open(self) -> Sequence[int]:
        return [choice for choice in range(len(self._ids)) if choice not in self._ended]

    def check_invariants(self) -> None:
        assert max(map(len, self._ids)) <= self._max_tokens
        assert self.num_tokens == sum(map(len, self._ids))

    def output(self) -> tuple[ChoiceOutput, ...]:
        """What the client has of each open answer, for a worker that is to go on with them; nothing before a token."""
        if not self.num_tokens:
            return ()
        return tuple(ChoiceOutput(choice, cast(PackedInts, self._ids[choice][:])) for choice in self._open)

    def end_unheard(self) -> list[GenerationEnd]:
        """Ends of answers that are whole, though their worker was lost before it could say so."""
        last = [(choice, self._ids[choice]) for choice in self._open if self._ids[choice]]
        endings = [(choice, self._sampling.ending_after(ids[-1], len(ids))) for choice, ids in last]
        ends = [self._end_of(choice, found.reason, found.stop_token_id) for choice, found in endings if found]
        self._ended |= {end.choice for end in ends}
        return ends

    def fault_in(self, message: Tokens) -> str | None:
        """Why no honest worker says this now; an answer that the client ended may go on for a while."""
        if not 0 <= message.choice < len(self._ids):
            return f"tokens of choice {message.choice} came, {len(self._ids)} were asked for"
        next_index = len(self._ids[message.choice])
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
        choice, index = message.choice, len(self._ids[message.choice])
        token_ids, logprobs = message.token_ids[index - message.index :], message.logprobs[index - message.index :]
        if not token_ids or choice in self._ended:
            return None
        if not self.num_tokens:
            self._num_cached_tokens = message.num_cached_tokens
        num_cached = 0 if index else self._num_cached_tokens
        chunk = TokenChunk(index, token_ids, logprobs, num_cached, () if self.num_tokens else scores(), choice)
        self._ids[choice].extend(token_ids)
        self.num_tokens += len(token_ids)
        return chunk

    def next_chunk(self, message: Tokens) -> TokenChunk | None:
        """As `add`, for the plain case that almost all tokens are; None, with nothing done, where it is not that."""
        choice, token_ids = message.choice, message.token_ids
        if not 0 <= choice < len(self._ids) or choice in self._ended:
            return None
        ids, count = self._ids[choice], len(token_ids)
        index = len(ids)
        if not index or not count or message.index != index or message.num_cached_tokens:
            return None
        if index + count > self._max_tokens or (message.logprobs and len(message.logprobs) != count):
            return None
        if count == 1:
            ids.append(token_ids[0])
        else:
            ids.extend(token_ids)
        self.num_tokens += count
        return TokenChunk(index, token_ids, message.logprobs, choice=choice)

    def fault_in_end(self, message: Finished) -> str | None:
        count = len(self._ids[message.choice]) if 0 <= message.choice < len(self._ids) else -1
        is_right = message.index == count and message.reason in ("stop", "length")
        if is_right or message.choice in self._ended:
            return None
        return f"finished ({message.reason}) at token {message.index} of choice {message.choice}, {count} came"

    def finish(self, message: Finished) -> GenerationEnd | None:
        if not self.end(message.choice):
            return None
        return self._end_of(message.choice, message.reason, message.stop_token_id)

    def _end_of(self, choice: int, reason: str, stop_token_id: int | None) -> GenerationEnd:
        return GenerationEnd(reason, stop_token_id, self._num_cached_tokens, choice)

    def end(self, choice: int) -> bool:
        """Nothing more of this answer goes out. Returns whether it was not over before."""
        is_new = choice not in self._ended
        self._ended.add(choice)
        return is_new


def true_status(status: int) -> int:
    """A worker's status as the client may see it: an error, whatever the worker said."""
    return status if 400 <= status <= 599 else 500
