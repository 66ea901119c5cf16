from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model.small_tokenizers import byte_fallback, byte_level, metaspace

from disagg.api.text.detokenizer import MAX_WINDOW
from disagg.api.text.tokenizer import ModelTokenizer

KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


@cache
def load(kind: str) -> ModelTokenizer:
    tokenizer = KINDS[kind]()
    return ModelTokenizer(tokenizer, {}, vocab_size=tokenizer.get_vocab_size() + 8, template=None)


def pieces(tokenizer: ModelTokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_joined_pieces_of_any_ids_are_the_whole_decoded(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = load(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=MAX_WINDOW - 1))
    assert "".join(pieces(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=40))
def test_pieces_of_any_text_never_cut_a_character(kind: str, text: str) -> None:
    tokenizer = load(kind)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_an_emoji_comes_whole_with_its_last_byte_or_the_token_after(kind: str) -> None:
    tokenizer = load(kind)
    ids = list(tokenizer.encode("🦊", add_special_tokens=False))
    assert len(ids) >= 4
    shown = [piece for piece in pieces(tokenizer, ids) if piece.strip()]
    assert [piece.strip() for piece in shown] == ["🦊"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    tokenizer = load("byte_level")
    ids = list(tokenizer.encode("🦊", add_special_tokens=False))[:-1]
    assert pieces(tokenizer, ids)[-1] == "\ufffd"


def test_special_tokens_leave_no_text_unless_asked_for() -> None:
    tokenizer = load("byte_level")
    assert "".join(pieces(tokenizer, [1, 33, 2])) == tokenizer.decode([33])
    assert "".join(pieces(tokenizer, [1, 33, 2], skip=False)) == f"<eos>{tokenizer.decode([33])}<bos>"


def test_a_long_run_of_byte_tokens_is_given_out_in_bounded_windows() -> None:
    tokenizer = load("byte_fallback")
    ids = list(tokenizer.encode("中" * 200, add_special_tokens=False))
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert max(len(piece) for piece in found) <= MAX_WINDOW


def test_invalid_bytes_without_end_are_given_out_all_the_same() -> None:
    tokenizer = load("byte_fallback")
    found = pieces(tokenizer, [tokenizer.token_strings(range(300)).index("<0xFF>")] * 5 * MAX_WINDOW)
    assert sum(map(bool, found)) >= 2


@given(ids=st.lists(st.integers(0, 2047), max_size=40))
def test_spelled_bytes_of_byte_level_tokens_join_to_the_text(ids: list[int]) -> None:
    tokenizer = load("byte_level")
    joined = b"".join(tokenizer.spell(id_) for id_ in ids)
    assert joined.decode("utf-8", "replace") == tokenizer.decode(ids, skip_special_tokens=False)
