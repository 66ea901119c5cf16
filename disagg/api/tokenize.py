"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from disagg.api.helpers.pool import Helpers
from disagg.api.http.bodies import Bodies
from disagg.api.http.responses import parts_response
from disagg.api.request.fields import DETOKENIZE, TOKENIZE
from disagg.router.generation import Backend


class TokenizeRoutes:
    def __init__(self, backend: Backend, bodies: Bodies, helpers: Helpers) -> None:
        self._backend = backend
        self._bodies = bodies
        self._helpers = helpers

    async def tokenize(self, request: Request) -> Response:
        """`{count, max_model_len, tokens, token_strs}` of a prompt or a conversation; the ids a request would have."""
        return await self._answer(TOKENIZE, request)

    async def detokenize(self, request: Request) -> Response:
        """`{prompt}`: the text of token ids, special tokens included."""
        return await self._answer(DETOKENIZE, request)

    async def _answer(self, endpoint: str, request: Request) -> Response:
        async with self._bodies.read(request) as body:
            return parts_response(await self._helpers.text(endpoint, body, self._backend.max_model_len()))
