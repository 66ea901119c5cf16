"""Prompts of requests as token ids. It takes as long as the text is: for an event loop only if that is short."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from disagg.api.http.errors import bad_request
from disagg.api.request.checks import UnexpectedValueError
from disagg.api.request.params import RequestParams
from disagg.api.request.request_checks import TOKEN_IDS, Prompt
from disagg.api.request.sampling import check_room, check_token_ids
from disagg.api.text.template import TemplateError
from disagg.api.text.tokenizer import ModelTokenizer

Encoded = tuple[Sequence[int], str]
"""Token ids as an array, and the text to echo (empty unless asked for)."""


class PromptEncoder:
    """`max_model_len` of its methods: what is too long for it is refused as early as that is known; None = no limit."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer

    def completions(self, params: RequestParams, max_model_len: int | None = None) -> list[Encoded]:
        """Every prompt of the request, in order. Raises ApiError 400 for an empty one or one out of the vocabulary."""
        return [self._prompt(params, prompt, max_model_len) for prompt in params.prompt or ()]

    def chat(self, params: RequestParams, max_model_len: int | None = None) -> list[Encoded]:
        """The conversation. Raises ApiError 400 when the model has no template or the template refuses it."""
        ids = self._encode_rendered(self._render(params), params, max_model_len)
        return [(array("i", ids), "")]

    def _prompt(self, params: RequestParams, prompt: Prompt, max_model_len: int | None) -> Encoded:
        if not prompt:  # though BOS alone could be continued: a client that means that can send its id
            raise bad_request("`prompt`: empty; send at least one character or token id", "prompt")
        if isinstance(prompt, str):
            self._check_length(params, prompt, max_model_len)
            ids: Sequence[int] = self._tokenizer.encode(
                prompt, add_special_tokens=params.add_special_tokens is not False
            )
        else:
            ids = prompt
        if not ids:
            raise bad_request("`prompt`: the tokenizer makes no token of it", "prompt")
        check_room(params, len(ids), max_model_len)
        if isinstance(prompt, str):
            return array("i", ids), prompt if params.echo else ""
        if isinstance(prompt, list):
            ids = _checked(prompt)
        check_token_ids(ids, self._tokenizer.vocab_size, "prompt")
        return ids, self._tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens) if params.echo else ""

    def _render(self, params: RequestParams) -> str:
        template = self._tokenizer.template
        if template is None:
            raise bad_request("this model has no chat template; send a `prompt` to /v1/completions", "messages")
        try:
            return template.render(
                params.messages or (),
                add_generation_prompt=params.add_generation_prompt,
                arguments=params.chat_template_kwargs,
            )
        except TemplateError as exc:
            raise bad_request(f"the model's chat template refuses these messages: {exc}", "messages") from exc

    def _encode_rendered(self, text: str, params: RequestParams, max_model_len: int | None) -> Sequence[int]:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise bad_request("`chat_template_kwargs`: expected valid Unicode", "chat_template_kwargs") from exc
        self._check_length(params, text, max_model_len)
        ids = self._tokenizer.encode_chat(text, add_special_tokens=bool(params.add_special_tokens))
        if not ids:
            raise bad_request("`messages`: the chat template makes an empty prompt of them", "messages")
        check_room(params, len(ids), max_model_len)
        return ids

    def _check_length(self, params: RequestParams, text: str, max_model_len: int | None) -> None:
        if max_model_len is not None and self._tokenizer.is_longer(text, max_model_len):
            check_room(params, 2 * max_model_len, max_model_len, is_least=True)


def _checked(ids: list[int]) -> Sequence[int]:
    """A list whose length fits the model, with its items looked at."""
    try:
        return TOKEN_IDS(ids)
    except UnexpectedValueError as exc:
        raise bad_request(f"`prompt{exc.path}`: {exc}", f"prompt{exc.path}") from exc
