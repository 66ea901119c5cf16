"""What a worker says of an attempt, judged: its tokens against those before them, its status against what is true."""

from __future__ import annotations

from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.tokens import Tokens


def fault_in(message: Tokens, num_tokens: int, request: GenerationRequest) -> str | None:
    """What is wrong with tokens of a worker that sent `num_tokens` before; None = nothing."""
    if not 0 <= message.index <= num_tokens:
        return f"token {message.index} came where {num_tokens} was next"
    if message.index + len(message.token_ids) > request.sampling.max_tokens:
        return f"more than max_tokens = {request.sampling.max_tokens} tokens came"
    if message.logprobs and len(message.logprobs) != len(message.token_ids):
        return f"{len(message.token_ids)} tokens came with {len(message.logprobs)} logprobs"
    if not 0 <= message.num_cached_tokens <= len(request.prompt):
        return f"{message.num_cached_tokens} of {len(request.prompt)} prompt tokens were cached"
    return None


def plain_chunk(tokens: Tokens, num_tokens: int, max_tokens: int) -> TokenChunk | None:
    """The next tokens after `num_tokens` as the client gets them; None where they are not plainly those."""
    token_ids, logprobs = tokens.token_ids, tokens.logprobs
    if tokens.index != num_tokens or not token_ids or tokens.num_cached_tokens:
        return None
    if num_tokens + len(token_ids) > max_tokens or (logprobs and len(logprobs) != len(token_ids)):
        return None
    return TokenChunk(num_tokens, token_ids, logprobs)


def true_status(status: int) -> int:
    """A worker's status as the client may see it: an error, whatever the worker said."""
    return status if 400 <= status <= 599 else 500
