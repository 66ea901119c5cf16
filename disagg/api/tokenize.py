"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from disagg.api.errors import bad_request
from disagg.api.fields import DETOKENIZE, TOKENIZE, parse_params
from disagg.api.generate import require_model
from disagg.api.params import RequestParams
from disagg.api.prompts import PromptEncoder
from disagg.api.sampling import check_token_ids
from disagg.api.settings import ApiSettings
from disagg.api.tokenizer import ModelTokenizer
from disagg.api.wire import json_response, read_json
from disagg.router.generation import Backend


class TokenizeRoutes:
    def __init__(self, backend: Backend, settings: ApiSettings, tokenizer: ModelTokenizer) -> None:
        self._backend = backend
        self._settings = settings
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)

    async def tokenize(self, request: Request) -> Response:
        """`{count, max_model_len, tokens, token_strs}` of a prompt or a conversation; the ids a request would have."""
        params = await self._params(request, TOKENIZE)
        ids = await self._ids(params)
        strings = self._tokenizer.token_strings(ids) if params.return_token_strs else None
        limit = self._backend.max_model_len()
        return json_response({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        """`{prompt}`: the text of token ids, special tokens included."""
        params = await self._params(request, DETOKENIZE)
        if params.tokens is None:
            raise bad_request("`tokens` is required", "tokens", code="missing_required_parameter")
        check_token_ids(params.tokens, self._tokenizer.vocab_size, "tokens")
        text = await asyncio.to_thread(self._tokenizer.decode, params.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    async def _params(self, request: Request, endpoint: str) -> RequestParams:
        params = parse_params(endpoint, await read_json(request, self._settings.max_body_nbytes))
        require_model(params, self._settings)
        return params

    async def _ids(self, params: RequestParams) -> tuple[int, ...]:
        if (params.prompt is None) == (params.messages is None):
            raise bad_request("send either `prompt` or `messages`", "prompt", code="missing_required_parameter")
        if params.messages is not None:
            return (await self._encoder.chat(params))[0]
        if len(params.prompt or ()) != 1:
            raise bad_request("`prompt`: expected one string", "prompt")
        return (await self._encoder.completions(replace(params, echo=False)))[0][0]
