"""Token ids to text, one at a time: the pieces joined are the whole decoded, and no piece ends inside a character.

A byte-level vocabulary (GPT-2, Llama 3, Qwen, gpt-oss) spells bytes, so its text is a byte stream put through an
incremental UTF-8 decoder: exact, and constant work per token. Every other decoder is asked to decode a short window
again with each token, because what a token spells may depend on the tokens before it: spaces stripped at the start,
`<0xNN>` tokens whose run is valid UTF-8 only as a whole. The window is closed, and its text given out, where no later
token can change it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Final, Protocol

REPLACEMENT: Final = "\ufffd"
MAX_WINDOW: Final = 64
"""Tokens after which a window closes at the next whole character, though more byte tokens follow; at twice as many it
closes anywhere. Valid text is not changed by that, as 64 byte tokens are at least 16 characters; a run of *invalid*
bytes may show other replacement characters than decoding it whole. Without a bound runs cost their length squared."""


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""

    def flush(self) -> str:
        """The rest, when no token follows: bytes of an unfinished character become U+FFFD."""


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes. `spell` gives a token's bytes, none for a token without text."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self._spell = spell
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._spell(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For all others. `decode` is the tokenizer's own; `is_silent` marks tokens it skips; `is_byte` marks `<0xNN>`.

    `_window` begins with `_num_given` tokens whose text was given out: they are the context that the next depend on.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], is_silent: Callable[[int], bool], is_byte: Callable[[int], bool]
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._is_byte = is_byte
        self._window: list[int] = []
        self._num_given = 0
        self._given = ""

    def push(self, token_id: int) -> str:
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        num_new = len(self._window) - self._num_given
        if self._is_byte(token_id) and num_new < MAX_WINDOW:
            return ""
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and num_new < 2 * MAX_WINDOW:
            return ""
        return self._give(text)

    def flush(self) -> str:
        return self._give(self._decode(self._window)) if len(self._window) > self._num_given else ""

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        if new:  # tokens without text stay in the window: a context must have text to be one
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)
            self._given = self._decode(self._window)
        return new
