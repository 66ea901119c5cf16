"""Checks of request values: callables from JSON value to what the server uses, whose `str` says what they expect."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 60  # characters of a refused value that an error quotes


class UnexpectedValueError(ValueError):
    """The value is not what the field expects. `path` leads from the field to the part at fault, as `[0].content`."""

    def __init__(self, expected: str, value: Any, path: str = "") -> None:
        super().__init__(f"expected {expected}, got {shown(value)}")
        self.path = path


Check = Callable[[Any], Any]


def shown(value: Any) -> str:
    """A value as an error quotes it: short, on one line, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can spell half a surrogate pair, no tokenizer can read it."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    def __call__(self, value: Any) -> int:
        if not is_integer(value) or not self.low <= value <= self.high:
            raise UnexpectedValueError(str(self), value)
        return int(value)

    def __str__(self) -> str:
        if self.high >= 2**31 - 1:
            return "an integer" if self.low <= -(2**31) else f"an integer, {self.low} or more"
        return f"an integer from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number; `above` is an open lower bound, `low` a closed one."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def __call__(self, value: Any) -> float:
        if not (is_integer(value) or isinstance(value, float)):
            raise UnexpectedValueError(str(self), value)
        number = _to_float(value)
        if not math.isfinite(number) or not self.low <= number <= self.high or not number > self.above:
            raise UnexpectedValueError(str(self), value)
        return number

    def __str__(self) -> str:
        bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
        bounds += [f"{self.low:g} or more"] if self.low > -math.inf else []
        bounds += [f"at most {self.high:g}"] if self.high < math.inf else []
        return ", ".join(["a finite number", *bounds])


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Boolean:
    def __call__(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise UnexpectedValueError(str(self), value)
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class Text:
    max_length: int = 2**31 - 1
    min_length: int = 0

    def __call__(self, value: Any) -> str:
        if not is_text(value) or not self.min_length <= len(value) <= self.max_length:
            raise UnexpectedValueError(str(self), value)
        return str(value)

    def __str__(self) -> str:
        if self.max_length >= 2**31 - 1:
            return "a string of valid Unicode"
        return f"a string of valid Unicode, {self.min_length} to {self.max_length} characters"


@dataclass(frozen=True, slots=True)
class Exactly:
    """A field whose default is what the server does anyway: the default may be sent, nothing else."""

    value: Any

    def __call__(self, value: Any) -> Any:
        if value != self.value or isinstance(value, bool) != isinstance(self.value, bool):
            raise UnexpectedValueError(str(self), value)
        return value

    def __str__(self) -> str:
        return f"only {json.dumps(self.value)}"


@dataclass(frozen=True, slots=True)
class ListOf:
    item: Check
    max_length: int = 2**31 - 1
    min_length: int = 0

    def __call__(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not self.min_length <= len(value) <= self.max_length:
            raise UnexpectedValueError(str(self), value)
        return tuple(within(f"[{i}]", self.item, item) for i, item in enumerate(value))

    def __str__(self) -> str:
        bound = f" ({self.min_length} to {self.max_length})" if self.max_length < 2**31 - 1 else ""
        return f"a list{bound}, each {self.item}"


@dataclass(frozen=True, slots=True)
class Integers:
    """A list of 32-bit integers, as an array: its length is looked at first, and its items together."""

    item: Integer
    max_length: int

    def __call__(self, value: Any) -> array[int]:
        if not isinstance(value, list) or len(value) > self.max_length:
            raise UnexpectedValueError(str(self), value)
        try:
            numbers = array("i", value) if set(map(type, value)) <= {int} else None
        except OverflowError:
            numbers = None
        if numbers is None or (numbers and not self.item.low <= min(numbers) <= max(numbers) <= self.item.high):
            numbers = array("i", [within(f"[{i}]", self.item, item) for i, item in enumerate(value)])
        return numbers

    def __str__(self) -> str:
        return f"a list of at most {self.max_length}, each {self.item}"


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object with string keys and any values."""

    def __call__(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UnexpectedValueError(str(self), value)
        return value

    def __str__(self) -> str:
        return "an object"


def within(path: str, check: Check, value: Any) -> Any:
    """Check a part of a value, so that a refusal names the part."""
    try:
        return check(value)
    except UnexpectedValueError as exc:
        exc.path = path + exc.path
        raise
