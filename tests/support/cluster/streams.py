"""Streamed completions with any options, each on its own task, with the time of every token that its client saw."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Stream:
    """One request. `choices`: by number, what came of each answer."""

    request_id: str
    prompt: Sequence[int]
    options: dict[str, Any]
    is_whole: bool = False
    """Whether it ended with `[DONE]`."""
    errors: list[Any] = field(default_factory=list)
    choices: dict[int, Answer] = field(default_factory=dict)
    usage: Any = None
    ended_at: float = 0.0

    @property
    def fewest(self) -> int:
        """Tokens of the answer that has fewest."""
        answers = [self.choices.get(number, Answer()) for number in range(self.options.get("n", 1))]
        return min(len(answer.token_ids) for answer in answers)

    def gap_at(self, moment: float) -> float:
        """Seconds without a token around a moment, of the answer that waited longest."""
        gaps = []
        for answer in self.choices.values():
            after = [at for at in answer.seen_at if at > moment]
            before = [at for at in answer.seen_at if at <= moment]
            gaps += [min(after) - max(before)] if after and before else []
        return max(gaps, default=0.0)

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        body = {"prompt": list(self.prompt), "stream": True, "return_token_ids": True, **self.options}
        body["stream_options"] = {"include_usage": True}
        headers = {"X-Request-Id": self.request_id}
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                self.errors.append(await response.json())
                return
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    self.is_whole = True
                elif line.startswith(b"data: "):
                    self._take(json.loads(line[6:]))
        self.ended_at = time.monotonic()

    def _take(self, event: Any) -> None:
        self.errors += [event["error"]] if "error" in event else []
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.choices.setdefault(choice["index"], Answer()).take(choice)

    def told(self) -> dict[int, Any]:
        """What must be the same however often a worker died: ids, text and why it ended, by number."""
        return {n: (a.token_ids, a.text, a.finish_reason) for n, a in sorted(self.choices.items())}


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    seen_at: list[float] = field(default_factory=list)

    def take(self, choice: Any) -> None:
        if ids := choice.get("token_ids"):
            self.token_ids += ids
            self.seen_at.append(time.monotonic())
        self.text += choice.get("text") or ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", ())
