"""Events of a stream: what is encoded once for all of them gives the bytes that encoding each would."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.answers.answer import AnswerToken, Delta, Finish
from disagg.api.answers.choices import Choice
from disagg.api.answers.shapes import shape_for
from disagg.api.answers.sinks import EventSink, Head
from disagg.api.request.fields import CHAT, COMPLETIONS
from disagg.api.request.params import RequestParams
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.transceiver.wire.messages.values import TokenLogprobs

TOKENIZER = ModelTokenizer.load(DEMO_FOLDER)


def events(endpoint: str, deltas: list[Delta], *, is_short: bool, **params: Any) -> bytes:
    """What goes to the client for these steps of a choice that has begun."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def emit_all() -> None:
        shape = shape_for(RequestParams(endpoint=endpoint, **params), TOKENIZER)
        if not is_short:
            shape.says_text_alone = False
        sink = EventSink(send, Head(shape, "r", "model"), shape, includes_usage=False, timeout_s=1)
        sink._head._created = 0
        sink._before, sink._after = sink._head.event_ends(shape.event_kind)
        choice: Any = Choice(3, 0, None, None, has_begun=True)  # type: ignore[arg-type]  # no step looks at them
        for delta in deltas:
            await sink.emit(choice, delta)

    asyncio.run(emit_all())
    return b"".join(sent)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@given(texts=st.lists(st.text(max_size=8), max_size=4))
def test_the_short_way_to_an_event_writes_what_the_long_way_would(endpoint: str, texts: list[str]) -> None:
    deltas = [Delta(text, (AnswerToken(5, None, 0),)) for text in texts]
    assert events(endpoint, deltas, is_short=True) == events(endpoint, deltas, is_short=False)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("params", "delta"),
    [
        ({"return_token_ids": True}, Delta("x", (AnswerToken(5, None, 0),))),
        ({"logprobs": 1}, Delta("x", (AnswerToken(5, TokenLogprobs(-1.0), 0),))),
        ({}, Delta("x", (), Finish("stop", "y"))),
        ({}, Delta("\0\ud800é", ())),
    ],
)
def test_an_event_that_says_more_than_text_says_all_of_it(endpoint: str, params: Any, delta: Delta) -> None:
    written = events(endpoint, [delta], is_short=True, **params)
    assert written == events(endpoint, [delta], is_short=False, **params)
    assert json.loads(written.removeprefix(b"data: "))["choices"][0]["index"] == 3
