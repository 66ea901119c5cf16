"""The router as an API process sees it: the `Backend` of one process, over the link to the other."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncGenerator
from itertools import count
from typing import Any, Final

from disagg.api.processes.link import ProcessLink
from disagg.api.processes.messages import (
    AnswerChunk,
    AnswerCredit,
    AnswerEnd,
    AnswerError,
    CoreQuestion,
    CoreReply,
    CoreState,
    ProcessStop,
    StartAnswer,
    StopAnswer,
    StopChoice,
)
from disagg.router.generation import GenerationEnd, GenerationError, GenerationRequest, TokenChunk

CREDIT: Final = 64
"""Chunks of an answer that may be on their way or unread: a second of a fast worker, so credit never slows a client
that reads, and what a client that does not read leaves here stays a few KB."""
GRANTED_AT_ONCE: Final = 16
"""One message of credit for so many chunks."""


class RemoteBackend:
    """Implements `Backend`. `run` must be kept going; it ends when the router is gone or says stop."""

    def __init__(self, link: ProcessLink) -> None:
        self._link = link
        self._numbers = count()
        self._answers: dict[int, asyncio.Queue[TokenChunk | GenerationEnd | GenerationError]] = {}
        self._number_of: dict[GenerationRequest, int] = {}
        self._questions: dict[int, asyncio.Future[bytes]] = {}
        self._state = CoreState(is_ready=False, max_model_len=None)

    async def run(self) -> None:
        """Hear the router until it says stop. Raises EOFError when it is gone."""
        while not isinstance(message := await self._link.receive(), ProcessStop):
            self._hear(message)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk | GenerationEnd, None]:
        """See `Backend.generate`."""
        number, num_taken, num_open = next(self._numbers), 0, request.sampling.num_choices
        items = self._answers[number] = asyncio.Queue()
        self._number_of[request] = number
        self._link.send(_start(number, request))
        try:
            await self._link.drain()  # a prompt may be megabytes
            while num_open:
                item = await items.get()  # the router owns the deadline: it ends every request
                num_open -= isinstance(item, GenerationEnd)
                if isinstance(item, GenerationError):
                    num_open = 0
                    raise item
                yield item
                num_taken += 1
                if num_taken % GRANTED_AT_ONCE == 0 and num_open:
                    self._link.send(AnswerCredit(number, GRANTED_AT_ONCE))
        finally:
            del self._answers[number], self._number_of[request]
            if num_open:
                self._link.send(StopAnswer(number))

    def end_choice(self, request: GenerationRequest, choice: int) -> None:
        """See `Backend.end_choice`."""
        if (number := self._number_of.get(request)) is not None:
            self._link.send(StopChoice(number, choice))

    def is_ready(self) -> bool:
        """As the router said last, a quarter of a second ago at most."""
        return self._state.is_ready

    def max_model_len(self) -> int | None:
        return self._state.max_model_len

    async def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(await self._ask("workers"))
        return found

    async def metrics(self) -> bytes:
        return await self._ask("metrics")

    async def _ask(self, what: str) -> bytes:
        number = next(self._numbers)
        future = self._questions[number] = asyncio.get_running_loop().create_future()
        self._link.send(CoreQuestion(number, what))
        try:
            return bytes(await future)  # ends with the client, or with this process when the router is gone
        finally:
            del self._questions[number]

    def _hear(self, message: Any) -> None:
        match message:
            case AnswerChunk():
                self._give(message.number, _chunk(message))
            case AnswerEnd(number, reason, stop_token_id, num_cached_tokens, choice):
                self._give(number, GenerationEnd(reason, stop_token_id, num_cached_tokens, choice))
            case AnswerError(number, status, told, retry_after_s):
                self._give(number, GenerationError(status, told, retry_after_s=retry_after_s))
            case CoreState():
                self._state = message
            case CoreReply(number, content):
                if (future := self._questions.get(number)) is not None and not future.done():
                    future.set_result(content)

    def _give(self, number: int, item: TokenChunk | GenerationEnd | GenerationError) -> None:
        if (items := self._answers.get(number)) is not None:  # else its client left while this was on its way
            items.put_nowait(item)


def _chunk(told: AnswerChunk) -> TokenChunk:
    known = told.logprobs, told.num_cached_tokens, told.prompt_logprobs
    return TokenChunk(told.index, told.token_ids, *known, told.choice)


def _start(number: int, request: GenerationRequest) -> StartAnswer:
    return StartAnswer(
        number=number,
        request_id=request.request_id,
        prompt=array("i", request.prompt).tobytes(),
        sampling=request.sampling,
        credit=CREDIT,
        priority=request.priority,
        tenant=request.tenant,
        timeout_s=request.timeout_s,
    )
