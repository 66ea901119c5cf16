"""A model's tokenizer, without torch or transformers: `tokenizer.json` and the configs that the hub ships beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from disagg.api.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from disagg.api.text.template import ChatTemplate, find_template
from disagg.engine.model.weights import ModelRefused, read_config, read_json

SPECIAL_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BEGINNING_CHARS: Final = 16  # per token that there is room for; ordinary text has 4 per token
CACHED_TOKENS: Final = 65536  # spelled tokens kept: all that a server meets often, a few MB


class ModelTokenizer:
    """Text to token ids and back. Safe to call from several threads; encoding lets other threads run."""

    def __init__(
        self, tokenizer: Tokenizer, config: Mapping[str, Any], *, vocab_size: int, template: str | None
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self.vocab_size = vocab_size
        special = special_tokens(config)
        self.bos_token = special.get("bos_token")
        self._bos_id = tokenizer.token_to_id(self.bos_token) if self.bos_token else None
        self.template = None if template is None else ChatTemplate(template, special)
        self._silent_ids = frozenset(
            id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        self.spell: Callable[[int], bytes] = lru_cache(CACHED_TOKENS)(self._spell)

    @classmethod
    def load(cls, folder: Path) -> ModelTokenizer:
        """Raises ModelRefused when the folder has no usable tokenizer."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelRefused(f"`{folder}` has no tokenizer.json: save the model with its fast tokenizer")
        tokenizer = _read_tokenizer(file)
        config = {
            **(read_json(folder, "special_tokens_map.json") or {}),
            **(read_json(folder, "tokenizer_config.json") or {}),
        }
        vocab_size = vocabulary_size(read_config(folder)) or tokenizer.get_vocab_size()
        return cls(tokenizer, config, vocab_size=vocab_size, template=find_template(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if not add_special_tokens:
            return self._encode(text, special=False)
        if not self._has_explicit_bos:
            return self._encode(text, special=True)
        ids = self._encode(text, special=False)
        return (*self._own_bos, *ids, *self._own_eos)

    def encode_chat(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """A rendered conversation. BOS comes from the template, or from a tokenizer that adds it; never twice."""
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        bos = () if self._bos_id is None else (self._bos_id,)
        if bos and ids[:2] == bos + bos:
            return ids[1:]
        return ids if ids[:1] == bos else (*self._own_bos, *ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        silent = self._silent_ids if skip_special_tokens else frozenset()
        if self._is_byte_level:
            return ByteDetokenizer(lambda id_: b"" if id_ in silent else self.spell(id_))
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=False),
            lambda id_: id_ in silent or self._tokenizer.id_to_token(id_) is None,
            lambda id_: _byte_of(self._tokenizer.id_to_token(id_) or "") is not None,
        )

    def is_longer(self, text: str, num_tokens: int) -> bool:
        """Whether the text is clearly longer, told by its beginning: seconds of useless work are saved."""
        beginning = text[: BEGINNING_CHARS * (num_tokens + 1)]
        if len(beginning) == len(text):
            return False
        return len(self._encode(beginning, special=False)) > 2 * num_tokens  # the last word's tokens may differ

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own names, as `/tokenize` shows them."""
        return [self._tokenizer.id_to_token(id_) or "" for id_ in ids]

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        # The batch call, because `encode` holds the interpreter lock for as long as it runs.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    @property
    def _has_explicit_bos(self) -> bool:
        """Whether the config decides about BOS and EOS itself, overriding the post-processor, as in transformers."""
        return self._config.get("add_bos_token") is not None or self._config.get("add_eos_token") is not None

    @property
    def _own_bos(self) -> tuple[int, ...]:
        """BOS if the tokenizer adds it by itself."""
        if self._bos_id is None:
            return ()
        adds_bos = self._config.get("add_bos_token") if self._has_explicit_bos else self._post_processor_adds_bos
        return (self._bos_id,) if adds_bos else ()

    @property
    def _own_eos(self) -> tuple[int, ...]:
        eos = special_tokens(self._config).get("eos_token")
        eos_id = self._tokenizer.token_to_id(eos) if eos and self._config.get("add_eos_token") else None
        return () if eos_id is None else (eos_id,)

    @property
    def _post_processor_adds_bos(self) -> bool:
        return self._encode("", special=True)[:1] == (self._bos_id,)

    def _spell(self, token_id: int) -> bytes:
        """The bytes that a token stands for, out of context."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            # All of a token's characters stand for bytes, or it was added as it is written.
            values = [BYTE_OF_CHAR.get(char) for char in token]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else token.encode()
        byte = _byte_of(token)
        return token.replace("▁", " ").encode() if byte is None else bytes([byte])


def _read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer, tried once. Raises ModelRefused."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode_batch_fast(["Hello"], add_special_tokens=True)[0].ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # the library raises bare Exception, and its panics are not even those
        raise ModelRefused(f"`{file}` is not a tokenizer: {exc}") from exc
    return tokenizer


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by name; configs write them as a string or as an object with `content`."""
    entries = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding table; multimodal wrappers keep the language model's config inside."""
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _byte_of(token: str) -> int | None:
    """The byte that `<0xNN>` of a byte-fallback vocabulary stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _byte_characters() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR: Final = _byte_characters()
