"""A parsed request: what each honoured field said, and what follows from several of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg.api.request.request_checks import Prompt
from disagg.api.text.content_format import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParams:
    """One attribute per field of `disagg.api.request.fields`; None leaves the choice to the server."""

    endpoint: str
    model: str | None = None
    prompt: tuple[Prompt, ...] | None = None
    messages: tuple[Message, ...] | None = None
    tokens: Sequence[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    stream: bool = False
    stream_options: bool | None = None
    echo: bool = False
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    return_token_strs: bool = False
    priority: int = 0
    user: str | None = None
    cache_salt: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """None = no log-probabilities, 0 = only the chosen token's."""
        if isinstance(self.logprobs, bool):
            return (self.top_logprobs or 0) if self.logprobs else None
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As `num_logprobs`, of the prompt's tokens: for `prompt_logprobs`, or for `logprobs` of an echoed prompt."""
        asked = (self.prompt_logprobs, self.num_logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)

    @property
    def answer_limit(self) -> int | None:
        """Most tokens that the request asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options)
