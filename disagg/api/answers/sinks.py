"""Where the steps of an answer go: into one JSON body, or out as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import chain
from typing import Any, Final

from starlette.types import Message, Send

from disagg.api.answers.answer import Delta
from disagg.api.answers.at_once import within
from disagg.api.answers.choices import Choice
from disagg.api.answers.shapes import AnswerShape, usage
from disagg.api.http.errors import ApiError
from disagg.api.http.json_pieces import blocks, encode_json, encode_text, json_pieces, paced

CoroutineSend = Callable[[Message], Coroutine[Any, Any, None]]

MARK: Final = "\0"
"""Stands for the text of an event while what is around it is encoded; no other part of an event has this character."""


class ClientStalledError(Exception):
    """The client stopped reading; no error can reach it."""


class Head:
    """What every body or event of one answer says: id, time, model."""

    def __init__(self, shape: AnswerShape, request_id: str, model: str) -> None:
        self._id = f"{shape.prefix}-{request_id}"
        self._created = int(time.time())
        self._model = model

    def event_ends(self, kind: str, **others: Any) -> tuple[bytes, bytes]:
        """What stands before and after the one choice of an event, the same of every token."""
        before, _, after = encode_json(self.around(kind, [], **others)).rpartition(b'"choices":[]')
        return b"data: " + before + b'"choices":[', b"]" + after + b"\n\n"

    def around(self, kind: str, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **others,
        }


class WholeSink:
    """Collects the answer; `send` is called once, at the end."""

    def __init__(self, send: Send, head: Head, shape: AnswerShape) -> None:
        self._send = send
        self._head = head
        self._shape = shape

    async def emit(self, choice: Choice, delta: Delta) -> None:
        await self._shape.take_prompt(choice, delta)
        self._shape.add(choice, delta)
        choice.has_begun = choice.has_begun or bool(delta.tokens)

    async def close(self, choices: Sequence[Choice]) -> None:
        bodies = [self._shape.whole(choice) for choice in choices]
        body = self._head.around(self._shape.kind, bodies, **self._shape.extras(choices[0]), usage=usage(choices))
        await self._send(response_start(200, b"application/json"))
        async for block in paced(blocks(json_pieces(body))):
            await self._send({"type": "http.response.body", "body": block, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """A token was lost that a stream would have shown: 502, whatever the cause was called."""
        raise ApiError(502, error.message)


class EventSink:
    """Sends each step as an event. Status and headers go with the first, so that failures before it have a status."""

    def __init__(
        self, send: CoroutineSend, head: Head, shape: AnswerShape, *, includes_usage: bool, timeout_s: float
    ) -> None:
        self._raw_send = send
        self._head = head
        self._shape = shape
        self._usage = {"usage": None} if includes_usage else {}
        self._before, self._after = head.event_ends(shape.event_kind, **self._usage)
        self._timeout_s = timeout_s
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        """By choice: what stands around the text of an event."""
        self._lock = asyncio.Lock()  # choices emit concurrently; headers must come first and events whole
        self._has_started = False

    async def emit(self, choice: Choice, delta: Delta) -> None:
        if choice.has_begun:  # so its headers are out
            part = (
                self._text_event(choice, delta)
                or self._before + encode_json(self._shape.event(choice, delta)) + self._after
            )
            async with self._lock:
                await self._send_part(part)
            return
        await self._shape.take_prompt(choice, delta)
        event = self._shape.event(choice, delta)
        choice.has_begun = True
        value = self._head.around(self._shape.event_kind, [event], **self._shape.extras(choice), **self._usage)
        if self._shape.says_text_alone and not choice.echo:
            await self._event(value)
        else:  # the prompt's ids, text or log-probabilities
            await self._send_body(blocks(chain([b"data: "], json_pieces(value), [b"\n\n"])))

    def _text_event(self, choice: Choice, delta: Delta) -> bytes:
        """The event of a step that adds text and nothing else, as almost all do; empty for another.

        All but the text is the same in each of them: it is encoded once.
        """
        if not delta.text or delta.finish is not None or not self._shape.says_text_alone:
            return b""
        if (frame := self._frames.get(choice.index)) is None:
            before, after = encode_json(self._shape.event(choice, Delta(MARK))).split(encode_json(MARK))
            frame = self._frames[choice.index] = self._before + before, after + self._after
        return frame[0] + encode_text(delta.text) + frame[1]

    async def close(self, choices: Sequence[Choice]) -> None:
        if self._usage:
            await self._event(self._head.around(self._shape.event_kind, [], usage=usage(choices)))
        await self._send_body([b"data: [DONE]\n\n"], more=False)

    async def fail(self, error: ApiError) -> None:
        """The status is gone: the error is an event, and without `[DONE]` no client takes the stream for complete."""
        await self._event(error.body, more=False)

    async def _event(self, value: dict[str, Any], *, more: bool = True) -> None:
        await self._send_body([b"data: " + encode_json(value) + b"\n\n"], more=more)

    async def _send_body(self, parts: Iterable[bytes], *, more: bool = True) -> None:
        async with self._lock:  # until all of an event is out
            if not self._has_started:
                self._has_started = True
                await self._send(
                    response_start(200, b"text/event-stream; charset=utf-8", (b"cache-control", b"no-cache"))
                )
            async for part in paced(parts):
                await self._send_part(part)
            if not more:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send(self, message: Message) -> None:
        try:
            await within(self._timeout_s, self._raw_send(message))
        except TimeoutError:
            raise ClientStalledError(f"the client read nothing for {self._timeout_s:g} s") from None


Sink = WholeSink | EventSink


def response_start(status: int, media_type: bytes, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", media_type), *headers]}
