"""A router that says what a test scripts, and counts who asked, who cancelled and what is still open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from support.event_loop import PATIENCE_S

from disagg.router.generation import GenerationEnd, GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.values import TokenLogprobs

Step = TokenChunk | GenerationEnd | Exception | asyncio.Event
"""What to yield, what to raise, or what to wait for."""
Script = Callable[[GenerationRequest], Iterable[Step]]


def answer(
    token_ids: Sequence[int],
    *,
    group: int = 1,
    reason: str = "length",
    stop_token_id: int | None = None,
    num_cached_tokens: int = 0,
    num_logprobs: int | None = None,
) -> list[Step]:
    """A whole answer, `group` tokens per chunk."""
    steps: list[Step] = []
    for first in range(0, len(token_ids), group):
        ids = tuple(token_ids[first : first + group])
        steps.append(
            TokenChunk(
                first,
                ids,
                tuple(made_up_logprobs(id_, num_logprobs) for id_ in ids) if num_logprobs is not None else (),
            )
        )
    return [*steps, GenerationEnd(reason, stop_token_id, num_cached_tokens)]


def made_up_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The chosen token is the likeliest; its successors in the vocabulary follow."""
    return TokenLogprobs(-0.25, tuple((token_id + i, -0.25 - i) for i in range(num_top)))


class FakeBackend:
    """Implements `disagg.router.generation.Backend`."""

    def __init__(self, max_model_len: int | None = 256) -> None:
        self.script: Script = lambda request: answer([20] * min(3, request.sampling.max_tokens))
        self.limit = max_model_len
        self.requests: list[GenerationRequest] = []
        self.num_cancelled = 0
        self.ended_choices: list[tuple[str, int]] = []
        self.num_open = 0
        self._changed = asyncio.Event()
        self.records: dict[str, Mapping[str, Any]] = {}
        self.drained: dict[str, bool] = {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk | GenerationEnd]:
        self.requests.append(request)
        self.num_open += 1
        self._changed.set()
        num_left = request.sampling.num_choices
        try:
            async with aclosing(self._spoken(request)) as steps:
                async for step in steps:
                    num_left -= not isinstance(step, TokenChunk)
                    if isinstance(step, Exception):
                        num_left = 0
                        raise step
                    yield step
                    await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            self.num_cancelled += num_left > 0
            self._changed.set()

    async def _spoken(self, request: GenerationRequest) -> AsyncGenerator[Any, None]:
        """What the script gives, of several choices side by side."""
        if request.sampling.num_choices == 1:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
            return
        said: asyncio.Queue[Any] = asyncio.Queue(1)
        choices = range(request.sampling.num_choices)
        speakers = asyncio.gather(*(self._speak(request, choice, said) for choice in choices))
        try:
            while not (speakers.done() and said.empty()):
                if (step := await _first_of(said, speakers)) is not None:
                    yield step
        finally:
            speakers.cancel()

    async def _speak(self, request: GenerationRequest, choice: int, said: asyncio.Queue[Any]) -> None:
        """What the script gives for this choice alone."""
        for step in self.script(replace(request, sampling=request.sampling.of_choice(choice))):
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif (request.request_id, choice) not in self.ended_choices:
                await said.put(step if isinstance(step, Exception) else replace(step, choice=choice))

    def end_choice(self, request: GenerationRequest, choice: int) -> None:
        self.ended_choices.append((request.request_id, choice))

    async def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait for a condition on what is counted here."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def is_ready(self) -> bool:
        return self.limit is not None

    def max_model_len(self) -> int | None:
        return self.limit

    def workers(self) -> list[dict[str, Any]]:
        return [{"id": "p0", "role": "prefill", "requests": 0}]

    def record(self, request_id: str) -> Mapping[str, Any] | None:
        return self.records.get(request_id)

    def drain(self, worker_id: str, draining: bool = True) -> bool:
        self.drained[worker_id] = draining
        return worker_id == "p0"

    def metrics(self) -> bytes:
        return b"disagg_up 1\n"


async def _first_of(said: asyncio.Queue[Any], ended: asyncio.Future[Any]) -> Any:
    """The next step, or None when all have spoken. Raises what a script raised."""
    getting = asyncio.ensure_future(said.get())
    try:
        await asyncio.wait({getting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        ended.result()
        return None
    finally:
        getting.cancel()
