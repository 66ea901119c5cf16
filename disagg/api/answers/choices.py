"""Generating the choices of one request, all at once; the first failure, or the client's leaving, ends all of them."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from disagg.api.answers.answer import Answer, Delta, Finish
from disagg.api.answers.scored_prompt import ScoredPrompt
from disagg.api.http.json_pieces import Encoded, encode_json
from disagg.router.generation import Backend, GenerationEnd, GenerationError, GenerationRequest, TokenChunk


@dataclass(slots=True)
class Choice:
    """One answer in the making. `echo` is the prompt's text where the request wants it back.

    `prompt_index`: which of the request's prompts it answers.
    """

    index: int
    prompt_index: int
    request: GenerationRequest
    answer: Answer
    echo: str = ""
    finish: Finish | None = None
    has_begun: bool = False
    is_over: bool = False
    texts: list[str] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    logprobs: dict[str, Encoded] = field(default_factory=dict)
    scored_prompt: ScoredPrompt | None = None

    def add(self, delta: Delta, logprobs: Mapping[str, Sequence[Any]] | None) -> None:
        """Keep a step for the whole answer. Its log-probabilities are encoded now, as there may be very many."""
        self.texts.append(delta.text)
        self.token_ids.extend(token.token_id for token in delta.tokens)
        self.finish = delta.finish
        for name, items in (logprobs or {}).items():
            self.logprobs.setdefault(name, Encoded()).extend(map(encode_json, items))

    def echoed(self) -> dict[str, Encoded]:
        """The prompt's part of completions' `logprobs`, a copy."""
        lists = {} if self.scored_prompt is None else self.scored_prompt.echoed
        return {name: Encoded(items) for name, items in lists.items()}


Emit = Callable[[Choice, Delta], Awaitable[None]]


async def generate_all(backend: Backend, choices: Sequence[Choice], emit: Emit) -> None:
    """Run every choice to its finish and hand each step to `emit`. Raises GenerationError, the first there was."""
    by_prompt: dict[int, list[Choice]] = {}
    for choice in choices:
        by_prompt.setdefault(choice.prompt_index, []).append(choice)
    if len(by_prompt) == 1:
        await _generate(backend, choices, emit)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for some in by_prompt.values():
                group.create_task(_generate(backend, some, emit))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _generate(backend: Backend, choices: Sequence[Choice], emit: Emit) -> None:
    """The choices of one prompt, which are one request. One that a stop string ends early is called off."""
    request, num_open = choices[0].request, len(choices)
    items = cast("AsyncGenerator[TokenChunk | GenerationEnd]", backend.generate(request))
    async with aclosing(items):
        async for item in items:
            choice = choices[item.choice]
            if choice.is_over:
                continue
            delta = choice.answer.feed(item)
            await emit(choice, delta)
            if delta.finish is None:
                continue
            choice.is_over, num_open = True, num_open - 1
            if not num_open:
                return
            if not isinstance(item, GenerationEnd):
                backend.end_choice(request, item.choice)
    raise GenerationError(502, "the answer ended before it was complete")
