"""Checks of the values that only these requests have: prompts, messages, stop strings, biases, stream options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from disagg.api.request.checks import (
    Boolean,
    Check,
    Exactly,
    Integer,
    Integers,
    ListOf,
    Number,
    Text,
    UnexpectedValueError,
    is_integer,
    within,
)
from disagg.api.text.content_format import Message
from disagg.transceiver.wire.messages.sampling_limits import MAX_BIAS, MAX_BIASES

MAX_STOPS: Final = 4  # OpenAI's limit
MAX_STOP_LENGTH: Final = 1024  # every token's text is compared with each: a bound on that work
TOKEN_ID: Final = Integer(0, 2**31 - 1)  # the vocabulary is checked when the model is known

MAX_PROMPT_IDS: Final = 2**22  # in all prompts of a request: what a body of the largest size can hold
NUM_IDS_CHECKED_LATE: Final = 2**17  # a longer prompt is looked at once its length is known to fit the model
MAX_PROMPTS: Final = 2048  # OpenAI's limit; fewer choices are given, which is said with their number
MAX_MESSAGES: Final = 2**14  # turns of a conversation, parts of a turn: each takes a few microseconds

Prompt = Sequence[int] | str
TOKEN_IDS: Final = Integers(TOKEN_ID, MAX_PROMPT_IDS)


@dataclass(frozen=True, slots=True)
class Prompts:
    """OpenAI's four forms of `prompt`, as a tuple of texts or of token ids.

    Ids are an array, or the list as it came, of which only the length was looked at (`NUM_IDS_CHECKED_LATE`).
    """

    def __call__(self, value: Any) -> tuple[Prompt, ...]:
        if isinstance(value, str):
            return (_one_prompt(value),)
        if not isinstance(value, list):
            raise UnexpectedValueError(str(self), value)
        if not value:
            raise UnexpectedValueError("at least one token or text", value)
        if len(value) > (MAX_PROMPT_IDS if is_integer(value[0]) else MAX_PROMPTS):
            raise UnexpectedValueError(f"at most {MAX_PROMPTS} prompts or {MAX_PROMPT_IDS} token ids", value)
        if is_integer(value[0]):
            return (_one_prompt(value),)
        if len({type(item) for item in value}) > 1:
            raise UnexpectedValueError(str(self), value)
        if isinstance(value[0], list) and sum(map(len, value)) > MAX_PROMPT_IDS:
            raise UnexpectedValueError(f"at most {MAX_PROMPT_IDS} token ids in all", value)
        return tuple(within(f"[{i}]", _one_prompt, item) for i, item in enumerate(value))

    def __str__(self) -> str:
        return "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _one_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return Text()(value)
    if not isinstance(value, list):
        raise UnexpectedValueError("a string or a list of token ids", value)
    if not value:
        raise UnexpectedValueError("at least one token id", value)
    return value if len(value) > NUM_IDS_CHECKED_LATE else TOKEN_IDS(value)


@dataclass(frozen=True, slots=True)
class Stops:
    def __call__(self, value: Any) -> tuple[str, ...]:
        check = Text(max_length=MAX_STOP_LENGTH, min_length=1)
        if isinstance(value, str):
            return (check(value),)
        if not isinstance(value, list):
            raise UnexpectedValueError(str(self), value)
        return ListOf(check, max_length=MAX_STOPS)(value)

    def __str__(self) -> str:
        return f"a string or a list of at most {MAX_STOPS} strings, none empty or over {MAX_STOP_LENGTH} characters"


@dataclass(frozen=True, slots=True)
class LogitBias:
    def __call__(self, value: Any) -> tuple[tuple[int, float], ...]:
        if not isinstance(value, dict) or len(value) > MAX_BIASES:
            raise UnexpectedValueError(str(self), value)
        return tuple((_token_id_key(key), within(f".{key}", Number(-MAX_BIAS, MAX_BIAS), value[key])) for key in value)

    def __str__(self) -> str:
        return f"an object of at most {MAX_BIASES} entries from token id to a number from {-MAX_BIAS:g} to {MAX_BIAS:g}"


def _token_id_key(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise UnexpectedValueError("token ids as keys", key)
    return int(key)


STREAM_OPTIONS: Final[dict[str, Check]] = {"include_usage": Boolean(), "include_obfuscation": Exactly(False)}


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """True if the stream ends with its usage: the only option there is."""

    def __call__(self, value: Any) -> bool:
        if not isinstance(value, dict):
            raise UnexpectedValueError(str(self), value)
        options = _checked_keys(value, STREAM_OPTIONS)
        return bool(options.get("include_usage", False))

    def __str__(self) -> str:
        return 'an object with `include_usage`, as {"include_usage": true}'


def _checked_keys(value: dict[str, Any], checks: dict[str, Check]) -> dict[str, Any]:
    """The object with null taken as unset; an unknown key is refused by its path."""
    present = {key: item for key, item in value.items() if item is not None}
    for key, item in present.items():
        if key not in checks:
            raise UnexpectedValueError(f"only the keys {', '.join(checks)}", key, f".{key[:64]}")
        present[key] = within(f".{key}", checks[key], item)
    return present


@dataclass(frozen=True, slots=True)
class MessageRole:
    """Which roles a conversation may have is the template's to say; that it is a role is ours."""

    def __call__(self, value: Any) -> str:
        if value in ("tool", "function"):
            raise UnexpectedValueError("a role other than `tool` and `function`, as tools are not supported", value)
        return Text(max_length=64, min_length=1)(value)

    def __str__(self) -> str:
        return "a role"


def _content(value: Any) -> str | list[dict[str, str]]:
    """Text, or its parts with null fields dropped."""
    if isinstance(value, str):
        return Text()(value)
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise UnexpectedValueError("a string or a list of text parts", value)
    return [within(f"[{i}]", _text_part, part) for i, part in enumerate(value)]


def _text_part(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UnexpectedValueError('a text part, as {"type": "text", "text": "..."}', value)
    if value.get("type") != "text":
        raise UnexpectedValueError("a part of type `text`, as this server reads text only", value.get("type"))
    part = _checked_keys(value, {"type": Text(), "text": Text()})
    if "text" not in part:
        raise UnexpectedValueError("a string", None, ".text")
    return part


MESSAGE_KEYS: Final[dict[str, Check]] = {"role": MessageRole(), "content": _content, "name": Text(max_length=64)}
# What answers carry and clients send back with the history. They say nothing, so there is nothing to pass on.
REPLAYED_KEYS: Final[dict[str, Check]] = {"tool_calls": Exactly([]), "annotations": Exactly([])}


@dataclass(frozen=True, slots=True)
class Messages:
    def __call__(self, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
            raise UnexpectedValueError(str(self), value)
        return tuple(within(f"[{i}]", _message, item) for i, item in enumerate(value))

    def __str__(self) -> str:
        return "a list of at least one message with `role` and `content` (text)"


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise UnexpectedValueError("a message with `role` and `content`", value)
    message = _checked_keys(value, MESSAGE_KEYS | REPLAYED_KEYS)
    message = {key: item for key, item in message.items() if key not in REPLAYED_KEYS}
    if message.get("role") == "assistant":
        message.setdefault("content", "")  # null where an answer was all tool calls, or nothing
    for key in ("role", "content"):
        if key not in message:
            raise UnexpectedValueError("a string", None, f".{key}")
    return message


RESERVED_TEMPLATE_NAMES: Final = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


@dataclass(frozen=True, slots=True)
class TemplateArguments:
    def __call__(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UnexpectedValueError(str(self), value)
        for key in RESERVED_TEMPLATE_NAMES & value.keys():
            raise UnexpectedValueError("names that the request does not set itself", key, f".{key}")
        return value

    def __str__(self) -> str:
        return "an object of names and values for the chat template"
