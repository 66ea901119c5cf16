"""Prompts of requests as token ids. Long texts are encoded in a thread, so that no other request waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from disagg.api.errors import bad_request
from disagg.api.params import RequestParams
from disagg.api.request_checks import Prompt
from disagg.api.sampling import check_token_ids
from disagg.api.template import TemplateError
from disagg.api.tokenizer import ModelTokenizer

INLINE_CHARS: Final = 4096  # encoding so much takes about a millisecond: less than what handing it over may cost

Encoded = tuple[tuple[int, ...], str]
"""Token ids, and the text to echo (empty unless asked for)."""

T = TypeVar("T")


class PromptEncoder:
    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer

    async def completions(self, params: RequestParams) -> list[Encoded]:
        """Every prompt of the request, in order. Raises ApiError 400 for an empty one or one out of the vocabulary."""
        prompts = params.prompt or ()
        size = sum(len(prompt) for prompt in prompts)
        return await _maybe_in_thread(lambda: [self._prompt(params, prompt) for prompt in prompts], size)

    async def chat(self, params: RequestParams) -> Encoded:
        """The conversation. Raises ApiError 400 when the model has no template or the template refuses it."""
        size = sum(len(str(message["content"])) for message in params.messages or ())
        return await _maybe_in_thread(lambda: (self._chat(params), ""), size)

    def _prompt(self, params: RequestParams, prompt: Prompt) -> Encoded:
        if not prompt:  # though BOS alone could be continued: whoever means that can send its id
            raise bad_request("`prompt`: empty; send at least one character or token id", "prompt")
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens=params.add_special_tokens is not False)
            echo = prompt
        else:
            check_token_ids(prompt, self._tokenizer.vocab_size, "prompt")
            ids = prompt
            echo = self._tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens) if params.echo else ""
        if not ids:
            raise bad_request("`prompt`: the tokenizer makes no token of it", "prompt")
        return ids, echo if params.echo else ""

    def _chat(self, params: RequestParams) -> tuple[int, ...]:
        template = self._tokenizer.template
        if template is None:
            raise bad_request("this model has no chat template; send a `prompt` to /v1/completions", "messages")
        try:
            text = template.render(
                params.messages or (),
                add_generation_prompt=params.add_generation_prompt,
                arguments=params.chat_template_kwargs,
            )
        except TemplateError as exc:
            raise bad_request(f"the model's chat template refuses these messages: {exc}", "messages") from exc
        return self._encode_rendered(text, params)

    def _encode_rendered(self, text: str, params: RequestParams) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise bad_request("`chat_template_kwargs`: expected valid Unicode", "chat_template_kwargs") from exc
        ids = self._tokenizer.encode_chat(text, add_special_tokens=bool(params.add_special_tokens))
        if not ids:
            raise bad_request("`messages`: the chat template makes an empty prompt of them", "messages")
        return ids


async def _maybe_in_thread(encode: Callable[[], T], size: int) -> T:
    return await asyncio.to_thread(encode) if size > INLINE_CHARS else encode()
