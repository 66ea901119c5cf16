"""The JSON of answers: completions and chat, whole and as stream events, with vLLM's additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from disagg.api.answers.answer import Delta, Finish
from disagg.api.answers.choices import Choice
from disagg.api.answers.logprobs import LogprobFormat
from disagg.api.request.fields import CHAT
from disagg.api.request.params import RequestParams
from disagg.api.text.tokenizer import ModelTokenizer


class AnswerShape(Protocol):
    """How one endpoint writes choices. `prefix` begins ids; `kind`, `event_kind` are `object` whole and streamed."""

    prefix: str
    kind: str
    event_kind: str

    def add(self, choice: Choice, delta: Delta) -> None:
        """Keep one step of a choice for `whole`."""

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice, all of whose steps were added."""

    def event(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """One step of a choice."""

    def extras(self, choice: Choice) -> dict[str, Any]:
        """What stands beside `choices` in a whole answer and in a choice's first event."""


def shape_for(params: RequestParams, tokenizer: ModelTokenizer) -> AnswerShape:
    logprobs = LogprobFormat(tokenizer, as_token_ids=params.return_tokens_as_token_ids)
    shape = ChatShape if params.endpoint == CHAT else CompletionShape
    return shape(logprobs, params.return_token_ids)


class CompletionShape:
    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, logprobs: LogprobFormat, return_token_ids: bool) -> None:
        self._logprobs = logprobs
        self._return_token_ids = return_token_ids

    def add(self, choice: Choice, delta: Delta) -> None:
        choice.add(delta, self._logprobs.completions(delta.tokens, len(choice.echo)))

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = choice.echo + "".join(choice.texts)
        return self._choice(choice, text, choice.token_ids, choice.logprobs or None, choice.finish, with_prompt=True)

    def event(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        text = delta.text if choice.has_begun else choice.echo + delta.text
        ids = [token.token_id for token in delta.tokens]
        logprobs = self._logprobs.completions(delta.tokens, len(choice.echo))
        return self._choice(choice, text, ids, logprobs, delta.finish, with_prompt=not choice.has_begun)

    def extras(self, choice: Choice) -> dict[str, Any]:
        return {}

    def _choice(
        self,
        choice: Choice,
        text: str,
        token_ids: Sequence[int],
        logprobs: Mapping[str, Any] | None,
        finish: Finish | None,
        *,
        with_prompt: bool,
    ) -> dict[str, Any]:
        result = {"index": choice.index, "text": text, "logprobs": logprobs, **finish_fields(finish)}
        if self._return_token_ids:
            result["token_ids"] = token_ids
            result |= {"prompt_token_ids": choice.request.prompt} if with_prompt else {}
        return result


class ChatShape:
    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def __init__(self, logprobs: LogprobFormat, return_token_ids: bool) -> None:
        self._logprobs = logprobs
        self._return_token_ids = return_token_ids

    def add(self, choice: Choice, delta: Delta) -> None:
        choice.add(delta, self._logprobs.chat(delta.tokens))

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        return self._choice(choice, {"message": message}, choice.token_ids, choice.logprobs or None, choice.finish)

    def event(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or not choice.has_begun else {}
        role = {} if choice.has_begun else {"role": "assistant"}
        ids = [token.token_id for token in delta.tokens]
        return self._choice(choice, {"delta": role | content}, ids, self._logprobs.chat(delta.tokens), delta.finish)

    def extras(self, choice: Choice) -> dict[str, Any]:
        return {"prompt_token_ids": choice.request.prompt} if self._return_token_ids else {}

    def _choice(
        self,
        choice: Choice,
        content: dict[str, Any],
        token_ids: Sequence[int],
        logprobs: Mapping[str, Any] | None,
        finish: Finish | None,
    ) -> dict[str, Any]:
        result = {"index": choice.index, **content, "logprobs": logprobs, **finish_fields(finish)}
        if self._return_token_ids:
            result["token_ids"] = token_ids
        return result


def finish_fields(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of the request. A prompt counts once, however many choices were drawn from it.

    The choices of one prompt find each other's work in the cache: what was there before is what each of them found.
    """
    by_prompt: dict[int, list[Choice]] = {}
    for choice in choices:
        by_prompt.setdefault(choice.prompt_index, []).append(choice)
    num_prompt = sum(len(group[0].request.prompt) for group in by_prompt.values())
    num_cached = sum(min(choice.answer.num_cached_tokens for choice in group) for group in by_prompt.values())
    num_completion = sum(choice.answer.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
