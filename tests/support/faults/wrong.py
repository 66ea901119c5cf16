"""Failures that no slow machine explains: they are never tried again.

A test in true time gets a second try, because a process that is not run for three seconds *is* lost. Nothing makes a
token, a byte or a count wrong, or keeps a block for good, but a fault in the code, however rarely it shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Wrong(AssertionError):
    """A wrong answer, wrong bytes, something done twice, a block that is never given back."""


def same(found: Any, expected: Any, where: object = "") -> None:
    """Raises `Wrong` unless these are equal."""
    if found != expected:
        raise Wrong(f"{where}: {found!r}, expected {expected!r}")


@contextlib.contextmanager
def never_late() -> Iterator[None]:
    """Assertions within are about what is right, not about when: one that fails is `Wrong`. Also a decorator."""
    try:
        yield
    except AssertionError as error:
        raise Wrong(str(error)) from error


def wrong_in(error: BaseException | None) -> Wrong | None:
    """The first `Wrong` in an error, the errors it came from or came upon, and, of a group, its members."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        if isinstance(one, Wrong):
            return one
        seen.add(id(one))
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        waiting += [*members, one.__cause__, one.__context__]
    return None
