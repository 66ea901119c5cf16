"""The user's mistakes: each is one sentence with the value, what was expected and the next step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class ConfigError(ValueError):
    """Something the user gave cannot be used. The command line prints the sentence and exits with code 2."""


def found_in(error: BaseException, *kinds: type[E]) -> E | None:
    """The first error of these kinds: `error`, or one in the (nested) group that it is.

    What is raised inside a task group arrives in an ExceptionGroup, which no `except ConfigError` catches.
    """
    return next((leaf for leaf in leaves(error) if isinstance(leaf, kinds)), None)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The plain exceptions of a (nested) group, in order; `error` alone if it is none."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
