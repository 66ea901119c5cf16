"""`POST /v1/completions` and `POST /v1/chat/completions`: from body to answer, ended at once when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, cast

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from disagg.api.answers.answer import Answer
from disagg.api.answers.choices import Choice, generate_all
from disagg.api.answers.shapes import shape_for
from disagg.api.answers.sinks import ClientStalledError, CoroutineSend, EventSink, Head, Sink, WholeSink
from disagg.api.helpers.pool import Helpers
from disagg.api.http.bodies import Bodies
from disagg.api.http.edge import request_id_of, tenant_of
from disagg.api.http.errors import ApiError, from_generation, no_workers
from disagg.api.http.request_timeout import request_timeout_of
from disagg.api.http.responses import error_response
from disagg.api.request.params import RequestParams
from disagg.api.request.preparation import Prepared
from disagg.api.request.sampling import answer_tokens, base_seed, build_sampling
from disagg.api.settings import ApiSettings
from disagg.api.text.stops import StopMatcher
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.router.generation import Backend, GenerationError, GenerationRequest

log: Final = logging.getLogger(__name__)


class GenerateEndpoint:
    """One of the two endpoints, as an ASGI application."""

    def __init__(
        self,
        endpoint: str,
        backend: Backend,
        settings: ApiSettings,
        tokenizer: ModelTokenizer,
        bodies: Bodies,
        helpers: Helpers,
    ) -> None:
        self._endpoint = endpoint
        self._backend = backend
        self._settings = settings
        self._tokenizer = tokenizer
        self._bodies = bodies
        self._helpers = helpers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with AsyncExitStack() as held:
            body = await held.enter_async_context(self._bodies.read(request))
            await while_connected(receive, self._prepare(body, held, scope, receive, send))

    async def _prepare(
        self, body: Sequence[bytes], held: AsyncExitStack, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            prepared = await self._helpers.generation(self._endpoint, body, self._backend.max_model_len())
        except ApiError as exc:
            await error_response(exc)(scope, receive, send)
            return
        await held.aclose()  # only the prompt is needed from here on
        await self._respond(prepared, scope, receive, send)

    async def _respond(self, prepared: Prepared, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything from the prepared request to the last byte, errors included."""
        params = prepared.params
        request_id = request_id_of(scope)
        status, choices = 200, list[Choice]()
        try:
            choices = await self._choices(prepared, request_id, tenant_of(scope), request_timeout_of(scope))
            await self._answer(choices, self._sink(params, request_id, send))
        except ApiError as exc:
            status = exc.status
            await error_response(exc)(scope, receive, send)
        except ClientStalledError as exc:
            log.warning("request `%s`: cancelled: %s", request_id, exc)
        finally:
            log_request(request_id, self._endpoint, params, choices, status)

    async def _choices(self, prepared: Prepared, request_id: str, tenant: str, timeout_s: float | None) -> list[Choice]:
        """Choices in order: all of the first prompt, then all of the second."""
        params, max_model_len, choices = prepared.params, self._backend.max_model_len(), list[Choice]()
        if max_model_len is None or not prepared.prompts:
            raise no_workers()
        seed, is_only = base_seed(params), len(prepared.prompts) == 1
        for ids, echo in prepared.prompts:
            max_tokens = answer_tokens(params, self._settings.defaults, len(ids), max_model_len)
            prompt = ids if isinstance(ids, array) and ids.typecode == "i" else array("i", ids)
            sampling = build_sampling(
                params, self._settings.defaults, max_tokens=max_tokens, seed=seed, tenant=tenant or None
            )
            name = request_id if is_only else f"{request_id}-{len(choices) // params.n}"
            request = GenerationRequest(name, prompt, sampling, params.priority, tenant, timeout_s)
            for _ in range(params.n):
                if choices:
                    await asyncio.sleep(0)  # a choice takes up to a millisecond to make: a turn for others between them
                choices.append(self._choice(params, len(choices), request, echo))
        return choices

    def _choice(self, params: RequestParams, index: int, request: GenerationRequest, echo: str) -> Choice:
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        stops = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        include_stop, is_empty = params.include_stop_str_in_output, params.answer_limit == 0
        answer = Answer(detokenizer, stops, request.sampling, include_stop=include_stop, is_empty=is_empty)
        return Choice(index, index // params.n, request, answer, echo)

    def _sink(self, params: RequestParams, request_id: str, send: Send) -> Sink:
        shape = shape_for(params, self._tokenizer)
        head = Head(shape, request_id, self._settings.served_model_name)
        if not params.stream:
            return WholeSink(send, head, shape)
        timeout_s = self._settings.send_timeout_s
        return EventSink(
            cast("CoroutineSend", send), head, shape, includes_usage=params.includes_usage, timeout_s=timeout_s
        )

    async def _answer(self, choices: Sequence[Choice], sink: Sink) -> None:
        try:
            await generate_all(self._backend, choices, sink.emit)
        except GenerationError as exc:
            if not any(choice.has_begun for choice in choices):
                raise from_generation(exc) from exc
            log.warning("request `%s`: failed after its first token: %s", choices[0].request.request_id, exc.message)
            await sink.fail(from_generation(exc))
        else:
            await sink.close(choices)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, or cancel it when the client leaves. The request's body must have been read."""
    connected = asyncio.timeout(None)  # ends the work where it stands, and tells that from the server's cancellation

    def leave(watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled():
            connected.reschedule(0)

    try:
        async with connected:
            watcher = asyncio.create_task(_disconnected(receive))
            watcher.add_done_callback(leave)
            try:
                await work
            finally:
                watcher.remove_done_callback(leave)
                watcher.cancel()
    except TimeoutError:
        if not connected.expired():
            raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def log_request(request_id: str, endpoint: str, params: RequestParams, choices: Sequence[Choice], status: int) -> None:
    """One line per request: the record of its user (`user`), under the id that workers log too."""
    num_prompt = sum(len(request.prompt) for request in {choice.request for choice in choices})
    num_tokens = sum(choice.answer.num_tokens for choice in choices)
    log.info(
        "request `%s`: %s status %d, %d prompt tokens, %d tokens, user %s",
        *(request_id, endpoint, status, num_prompt, num_tokens, params.user),
    )
