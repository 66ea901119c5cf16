"""Errors of the cache. Running out of slots is ordinary; the other two end a start with one sentence."""

from __future__ import annotations


class CacheError(Exception):
    """Base; never raised itself."""


class PoolExhausted(CacheError):
    """A pool has fewer free slots than were asked for. Nothing changed."""


class PoolMemoryShort(CacheError):
    """The machine has no room for a pool of this size; the message names bytes asked and bytes free."""


class BudgetTooSmall(CacheError):
    """The memory budget cannot seat one sequence of the maximum length; the message says what would work."""
