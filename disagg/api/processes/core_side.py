"""The router's side of one API process: its answers, each pumped by credit, and its questions."""

from __future__ import annotations

import asyncio
import json
import logging
from array import array
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from disagg.api.processes.link import ProcessLink
from disagg.api.processes.messages import (
    AnswerChunk,
    AnswerCredit,
    AnswerEnd,
    AnswerError,
    CoreQuestion,
    CoreReply,
    CoreState,
    ProcessReady,
    ProcessStop,
    ProcessVitals,
    StartAnswer,
    StopAnswer,
    StopChoice,
)
from disagg.router.generation import Backend, GenerationEnd, GenerationError, GenerationRequest, TokenChunk

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Answer:
    task: asyncio.Task[None]
    credit: asyncio.Semaphore
    request: GenerationRequest


class CoreSide:
    """`run` serves the process until it is gone; then every answer of its clients is cancelled, and nothing else."""

    def __init__(self, backend: Backend, link: ProcessLink) -> None:
        self._backend, self._link = backend, link
        self._answers: dict[int, _Answer] = {}
        self._replies: set[asyncio.Task[None]] = set()
        self._told: CoreState | None = None
        self.ready = asyncio.Event()
        self.vitals: ProcessVitals | None = None

    @property
    def num_answers(self) -> int:
        return len(self._answers)

    async def run(self) -> None:
        """Until the process is gone, or says what no process of this version says."""
        try:
            while True:
                self._hear(await self._link.receive())
        except EOFError:
            return
        except ValueError:
            log.exception("an API process sent what cannot be read; its clients are cut off")
        finally:
            tasks = [*self._replies, *(answer.task for answer in self._answers.values())]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self._link.close()

    def tell(self, state: CoreState) -> None:
        """Send the router's state if the process was told another."""
        if state != self._told:
            self._told = state
            self._link.send(state)

    def stop(self) -> None:
        """Have the process accept no more clients and exit when its answers have ended."""
        self._link.send(ProcessStop())

    def _hear(self, message: Any) -> None:
        match message:
            case StartAnswer(number=number, credit=credit):
                allowed = asyncio.Semaphore(credit)
                request = _request(message)
                task = asyncio.create_task(self._pump(number, request, allowed), name=f"answer {number}")
                self._answers[number] = _Answer(task, allowed, request)
                task.add_done_callback(lambda _: self._answers.pop(number))
            case StopAnswer(number):
                if (answer := self._answers.get(number)) is not None:
                    answer.task.cancel()
            case StopChoice(number, choice):
                if (answer := self._answers.get(number)) is not None:
                    self._backend.end_choice(answer.request, choice)
            case AnswerCredit(number, count):
                if (answer := self._answers.get(number)) is not None:
                    for _ in range(count):
                        answer.credit.release()
            case CoreQuestion(number, what):
                reply = asyncio.create_task(self._answer_question(number, what), name=f"question {number}")
                self._replies.add(reply)
                reply.add_done_callback(self._replies.discard)
            case ProcessVitals():
                self.vitals = message
            case ProcessReady():
                self.ready.set()

    async def _pump(self, number: int, request: GenerationRequest, allowed: asyncio.Semaphore) -> None:
        """Send an answer, each chunk of it once there is credit: what a client has not read waits at the router."""
        try:
            async with aclosing(cast("Any", self._backend.generate(request))) as items:
                async for item in items:
                    if isinstance(item, TokenChunk):
                        await allowed.acquire()
                    self._link.send(_message(number, item))
        except GenerationError as exc:
            self._link.send(AnswerError(number, exc.status, exc.message, exc.retry_after_s))
        except Exception:  # an error of ours on one request costs that request
            log.exception("request `%s`: the router failed", request.request_id)
            self._link.send(AnswerError(number, 500, "the router failed on this request; its log says how"))

    async def _answer_question(self, number: int, what: str) -> None:
        """Made beside the loop: of a thousand workers it takes half a second."""
        self._link.send(CoreReply(number, await asyncio.to_thread(self._reply, what)))

    def _reply(self, what: str) -> bytes:
        if what == "metrics":
            return cast("bytes", self._backend.metrics())
        return json.dumps(self._backend.workers()).encode()


def _request(start: StartAnswer) -> GenerationRequest:
    prompt = array("i")
    prompt.frombytes(start.prompt)
    return GenerationRequest(
        request_id=start.request_id,
        prompt=prompt,
        sampling=start.sampling,
        priority=start.priority,
        tenant=start.tenant,
        timeout_s=start.timeout_s,
    )


def _message(number: int, item: TokenChunk | GenerationEnd) -> AnswerChunk | AnswerEnd:
    if isinstance(item, TokenChunk):
        known = item.logprobs, item.num_cached_tokens, item.prompt_logprobs
        return AnswerChunk(number, item.index, tuple(item.token_ids), *known, item.choice)
    return AnswerEnd(number, item.reason, item.stop_token_id, item.num_cached_tokens, item.choice)
