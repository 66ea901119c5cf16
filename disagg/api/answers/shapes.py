"""The JSON of answers: completions and chat, whole and as stream events, with vLLM's additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from disagg.api.answers.answer import Delta, Finish
from disagg.api.answers.choices import Choice
from disagg.api.answers.logprobs import LogprobFormat
from disagg.api.answers.scored_prompt import ScoredPrompt
from disagg.api.http.json_pieces import Encoded, encode_json
from disagg.api.request.fields import CHAT
from disagg.api.request.params import RequestParams
from disagg.api.text.tokenizer import ModelTokenizer


class AnswerShape(Protocol):
    """How one endpoint writes choices. `prefix` begins ids; `kind`, `event_kind` are `object` whole and streamed."""

    prefix: str
    kind: str
    event_kind: str
    says_text_alone: bool
    """Whether a step that does not end a choice says nothing but its text, and the first the prompt's."""

    async def take_prompt(self, choice: Choice, delta: Delta) -> None:
        """Encode the prompt's log-probabilities where a step brings them. To be called before `add` or `event`."""

    def add(self, choice: Choice, delta: Delta) -> None:
        """Keep one step of a choice for `whole`."""

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished choice, all of whose steps were added."""

    def event(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """One step of a choice."""

    def extras(self, choice: Choice) -> dict[str, Any]:
        """What stands beside `choices` in a whole answer and in a choice's first event."""


def shape_for(params: RequestParams, tokenizer: ModelTokenizer) -> AnswerShape:
    return (ChatShape if params.endpoint == CHAT else CompletionShape)(params, tokenizer)


class Scored:
    """What both shapes do with a prompt's log-probabilities."""

    def __init__(self, params: RequestParams, tokenizer: ModelTokenizer) -> None:
        self._params, self._tokenizer = params, tokenizer
        self._prompts: dict[int, ScoredPrompt] = {}
        self._logprobs = LogprobFormat(tokenizer, as_token_ids=params.return_tokens_as_token_ids)
        self._return_token_ids = params.return_token_ids
        asked = (params.num_logprobs, params.num_prompt_logprobs, params.return_token_ids or None)
        self.says_text_alone = all(each is None for each in asked)

    async def take_prompt(self, choice: Choice, delta: Delta) -> None:
        if choice.scored_prompt is not None or choice.has_begun or self._params.num_prompt_logprobs is None:
            return
        choice.scored_prompt = self._prompts.get(choice.prompt_index)
        if choice.scored_prompt is None:  # the first step of all choices of a prompt brings them
            detokenizer = self._tokenizer.detokenizer(skip_special_tokens=self._params.skip_special_tokens)
            ids, parts = choice.request.prompt, delta.prompt_logprobs
            choice.scored_prompt = await ScoredPrompt.of(ids, parts, self._params, self._logprobs, detokenizer)
            self._prompts[choice.prompt_index] = choice.scored_prompt

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        if self._params.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": None if choice.scored_prompt is None else choice.scored_prompt.entries}


class CompletionShape(Scored):
    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def add(self, choice: Choice, delta: Delta) -> None:
        choice.logprobs = choice.logprobs or choice.echoed()
        choice.add(delta, self._logprobs.completions(delta.tokens, len(choice.echo)))

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = choice.echo + "".join(choice.texts)
        return self._choice(choice, text, choice.token_ids, choice.logprobs or None, choice.finish, with_prompt=True)

    def event(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        text = delta.text if choice.has_begun else choice.echo + delta.text
        ids = [token.token_id for token in delta.tokens]
        logprobs: Mapping[str, Any] | None = self._logprobs.completions(delta.tokens, len(choice.echo))
        if not choice.has_begun and (echoed := choice.echoed()):
            logprobs = joined(echoed, logprobs or {})
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
        result |= self._of_prompt(choice) if with_prompt else {}
        if self._return_token_ids:
            result["token_ids"] = token_ids
            result |= {"prompt_token_ids": choice.request.prompt} if with_prompt else {}
        return result


class ChatShape(Scored):
    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

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
        ids = {"prompt_token_ids": choice.request.prompt} if self._return_token_ids else {}
        return ids | self._of_prompt(choice)

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


def joined(echoed: Mapping[str, Encoded], answer: Mapping[str, Sequence[Any]]) -> dict[str, Encoded]:
    """Completions' `logprobs` of a prompt and of the answer's first tokens."""
    return {name: Encoded([*items, *map(encode_json, answer.get(name, ()))]) for name, items in echoed.items()}


def finish_fields(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of the request. A prompt counts once, however many choices were drawn from it.

    So do its cached tokens, which all its choices report alike.
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
