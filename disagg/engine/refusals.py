"""What no engine of this role, of these limits, will ever serve: said at once, whatever its pools hold."""

from __future__ import annotations

from disagg.engine.promised import Promised
from disagg.engine.sequence import PromptSequence, Request, Reservation


def role_refusal(sequence: Promised, role: str) -> str | None:
    """A prefill worker receives no KV; a decode worker computes prompts for no other worker. Both serve."""
    if role == "prefill" and isinstance(sequence, Reservation):
        return "this worker's role is `prefill`: it reserves no room for KV from elsewhere"
    if role == "decode" and isinstance(sequence, PromptSequence) and not sequence.serves:
        return "this worker's role is `decode`: it computes no prompt for another worker"
    return None


def request_refusal(request: Request, max_model_len: int, vocab_size: int | None) -> str | None:
    """What is wrong with the request itself, whatever the pools; None when nothing is."""
    if not request.prompt:
        return "the prompt is empty; give at least one token"
    if request.total_tokens > max_model_len:
        return (
            f"{request.prompt_len} prompt tokens and max_tokens {request.sampling.max_tokens} make "
            f"{request.total_tokens}, `--max-model-len` is {max_model_len}; shorten the prompt or lower max_tokens"
        )
    known = request.known
    if vocab_size is not None and not 0 <= min(known) <= max(known) < vocab_size:
        wrong = next(token for token in known if not 0 <= token < vocab_size)
        return f"prompt token id {wrong} is not in the vocabulary of {vocab_size}"
    return None
