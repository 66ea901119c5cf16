"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from disagg.api.answers.answer import AnswerToken
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.transceiver.wire.messages.values import TokenLogprobs

LOWEST: Final = -9999.0  # JSON has no minus infinity; vLLM's stand-in


class LogprobFormat:
    """Names tokens by their text, or by `token_id:N` where the request asked for that."""

    def __init__(self, tokenizer: ModelTokenizer, *, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def chat(self, tokens: Sequence[AnswerToken]) -> dict[str, Any] | None:
        """`{"content": [{token, logprob, bytes, top_logprobs}]}`, None where there are none."""
        content = [
            {
                **self._entry(token.token_id, token.logprobs.logprob),
                "top_logprobs": [self._entry(id_, value) for id_, value in token.logprobs.top],
            }
            for token in tokens
            if token.logprobs is not None
        ]
        return {"content": content} if content else None

    def completions(self, tokens: Sequence[AnswerToken], text_start: int) -> dict[str, Any] | None:
        """Parallel lists over tokens; offsets count from the returned text's start, `text_start` before the answer."""
        known = [(token, token.logprobs) for token in tokens if token.logprobs is not None]
        if not known:
            return None
        return {
            "tokens": [self._name(token.token_id) for token, _ in known],
            "token_logprobs": [_finite(logprobs.logprob) for _, logprobs in known],
            "top_logprobs": [self._top(token.token_id, logprobs) for token, logprobs in known],
            "text_offset": [text_start + token.text_offset for token, _ in known],
        }

    def ranked(self, token_id: int, rank: int, logprobs: TokenLogprobs | None, count: int) -> dict[str, Any] | None:
        """`{id: {logprob, rank, decoded_token}}` of a prompt's token and the `count` likeliest; None for the first."""
        if logprobs is None:
            return None
        entries = {str(token_id): self._rank(token_id, rank, logprobs.logprob)}
        for place, (id_, value) in enumerate(logprobs.top[:count], 1):
            entries.setdefault(str(id_), self._rank(id_, place, value))
        return entries

    def echoed(self, token_id: int, logprobs: TokenLogprobs | None, count: int, offset: int) -> dict[str, Any]:
        """One item of each list of `completions`, for a prompt's token; the first has no log-probabilities."""
        top = None if logprobs is None else TokenLogprobs(logprobs.logprob, logprobs.top[:count])
        return {
            "tokens": self._name(token_id),
            "token_logprobs": None if top is None else _finite(top.logprob),
            "top_logprobs": None if top is None else self._top(token_id, top),
            "text_offset": offset,
        }

    def _rank(self, token_id: int, rank: int, logprob: float) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._text(token_id)}

    def _top(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one; where two have the same name, the likelier counts."""
        top: dict[str, float] = {}
        for id_, value in (*logprobs.top, (token_id, logprobs.logprob)):
            top.setdefault(self._name(id_), _finite(value))
        return top

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.spell(token_id)),
        }

    def _name(self, token_id: int) -> str:
        if self._as_token_ids:
            return f"token_id:{token_id}"
        return self._text(token_id)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.spell(token_id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
