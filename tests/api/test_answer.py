from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cluster.fake_backend import answer
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.answers.answer import Answer, Finish
from disagg.api.text.stops import StopMatcher
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.wire.messages.values import Sampling

EOS = 1


@cache
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer.load(DEMO_FOLDER)


def ids_of(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def read(
    ids: list[int],
    *,
    group: int = 1,
    stop: tuple[str, ...] = (),
    include: bool = False,
    end: str = "length",
    **sampling: object,
) -> tuple[str, list[tuple[int, int]], Finish]:
    """Text, (token, offset) pairs and finish of an answer."""
    chosen = Sampling(max_tokens=1000, **sampling)  # type: ignore[arg-type]
    subject = Answer(tokenizer().detokenizer(), StopMatcher(stop, include=include), chosen, include_stop=include)
    text, tokens = "", []
    for item in answer(ids, group=group, reason=end, stop_token_id=ids[-1] if end == "stop" and ids else None):
        assert isinstance(item, TokenChunk | GenerationEnd)
        delta = subject.feed(item)
        text += delta.text
        tokens += [(token.token_id, token.text_offset) for token in delta.tokens]
        if delta.finish is not None:
            assert subject.num_tokens == len(tokens)
            return text, tokens, delta.finish
    raise AssertionError("no end")


@given(
    ids=st.lists(st.integers(0, 2047), min_size=1, max_size=30),
    group=st.integers(1, 5),
    stop=st.lists(st.sampled_from(["e", "th", " a", "\ufffd", "ing t"]), max_size=3).map(tuple),
    min_tokens=st.integers(0, 5),
    end=st.sampled_from(["stop", "length"]),
)
def test_an_answer_does_not_depend_on_how_its_tokens_are_grouped(
    ids: list[int], group: int, stop: tuple[str, ...], min_tokens: int, end: str
) -> None:
    options = {
        "stop": stop,
        "end": end,
        "min_tokens": min_tokens,
        "stop_token_ids": (ids[-1],),
        "eos_token_ids": (EOS,),
    }
    assert read(ids, group=group, **options) == read(ids, **options)  # type: ignore[arg-type]


@given(ids=st.lists(st.integers(0, 2047), min_size=1, max_size=30))
def test_text_and_offsets_are_those_of_the_whole_answer(ids: list[int]) -> None:
    text, tokens, finish = read(ids)
    assert text == tokenizer().decode(ids)
    assert finish == Finish("length")
    for i, (_, offset) in enumerate(tokens):
        # Up to a character that the tokens so far leave unfinished, which is not text yet.
        assert text[:offset] in (prefix := tokenizer().decode(ids[:i]))
        assert len(prefix) - offset <= 1


def test_what_ends_an_answer_leaves_no_text() -> None:
    ids = ids_of("hello world")
    assert read([*ids, EOS], end="stop", eos_token_ids=(EOS,))[0] == "hello world"
    text, tokens, finish = read([*ids, *ids_of(".")], end="stop", stop_token_ids=tuple(ids_of(".")))
    assert (text, finish) == ("hello world", Finish("stop", ids_of(".")[0]))
    assert len(tokens) == len(ids) + 1


def test_a_stop_token_that_did_not_end_the_answer_is_text() -> None:
    """Before `min_tokens` the worker goes on, and so must the text."""
    ids = ids_of("a.b.")
    dot = ids_of(".")[0]
    assert read(ids, end="stop", stop_token_ids=(dot,), min_tokens=2)[0] == "a.b"


def test_include_stop_keeps_the_stop_token_and_the_stop_string() -> None:
    assert read(ids_of("hello."), end="stop", include=True, stop_token_ids=tuple(ids_of(".")))[0] == "hello."
    assert read(ids_of("hello world and more"), include=True, stop=("wor",))[0] == "hello wor"


def test_a_stop_string_split_over_tokens_never_shows() -> None:
    ids = ids_of("one two STOPPED three")
    text, tokens, finish = read(ids, stop=("two STOPPED",))
    assert (text, finish) == ("one ", Finish("stop", "two STOPPED"))
    assert len(tokens) < len(ids)


def test_a_stop_string_within_min_tokens_is_text() -> None:
    ids = ids_of("aXbXc")
    assert read(ids, stop=("X",))[0] == "a"
    assert read(ids, stop=("X",), min_tokens=2)[0] == "aXb"


def test_repeated_or_missing_tokens_are_an_error() -> None:
    for index in (0, 2):
        subject = Answer(tokenizer().detokenizer(), StopMatcher(()), Sampling(max_tokens=9), include_stop=False)
        subject.feed(TokenChunk(0, (20,)))
        with pytest.raises(RuntimeError, match="expected token 1"):
            subject.feed(TokenChunk(index, (20,)))
