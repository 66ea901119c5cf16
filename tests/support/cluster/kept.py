"""A system that tests share until one fails: what a failed test did to it must not fail the next, or its second try."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import pytest

T = TypeVar("T")

FAILED = pytest.StashKey[bool]()
"""Of a test that has run: `conftest.py` notes it."""


class Kept(Generic[T]):
    """One system at a time, started when a test asks for it. Close it at the end."""

    def __init__(
        self, start: Callable[[], AbstractContextManager[T]], has_ended: Callable[[T], object] = lambda system: False
    ) -> None:
        """`has_ended`: whether a system that was left in order has ended since, so that a test needs another."""
        self._start, self._has_ended = start, has_ended
        self._stack: contextlib.ExitStack | None = None
        self._system: T | None = None

    @contextlib.contextmanager
    def lent_to(self, test: pytest.Item) -> Iterator[T]:
        """For one run of a test. Its failure ends the system."""
        yield self._get()
        if test.stash.get(FAILED, False):
            self.drop()

    def _get(self) -> T:
        if self._system is not None and self._has_ended(self._system):
            self.drop()
        if self._system is None:
            stack = contextlib.ExitStack()
            self._system = stack.enter_context(self._start())
            self._stack = stack
        return self._system

    def drop(self) -> None:
        """Without asking how it ends: something was wrong with it already."""
        stack, self._stack, self._system = self._stack, None, None
        if stack is not None:
            with contextlib.suppress(AssertionError):
                stack.__exit__(AssertionError, AssertionError(), None)

    def close(self) -> None:
        """In order, if it still runs."""
        stack, self._stack, self._system = self._stack, None, None
        if stack is not None:
            stack.close()
