"""What a transfer is for. Each end says which purposes it serves: of any other it is never asked.

The *source* of a transfer sends KV, the *sink* lands it, whatever the roles of their workers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

HANDOFF: Final = "handoff"
"""A computed prompt, to the worker that decodes its answer."""
PREFIX: Final = "prefix"
"""Cached blocks that a prompt begins with, to a worker that is about to compute it. No licence to decode."""
MOVE: Final = "move"
"""An answer that is being decoded, to another worker that goes on with it."""

PURPOSES: Final = (HANDOFF, PREFIX, MOVE)

_ALL: Final = (HANDOFF, PREFIX, MOVE)

SENDS: Final = {"prefill": (HANDOFF, PREFIX), "decode": (PREFIX, MOVE), "both": _ALL}
RECEIVES: Final = {"prefill": (PREFIX,), "decode": _ALL, "both": _ALL}
"""By role, what a worker can be the source and the sink of."""

_FIRST_SENDS: Final = {"prefill": (HANDOFF,)}
_FIRST_RECEIVES: Final = {"decode": (HANDOFF,)}


def served_by(role: str, *, reuses_prefixes: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what it sends, what it receives): without a prefix cache there is no `prefix` to serve."""
    left_out = () if reuses_prefixes else (PREFIX,)
    return _without(SENDS[role], left_out), _without(RECEIVES[role], left_out)


def told_or_first(
    role: str, sends: tuple[str, ...] | None, receives: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a registered worker serves; of protocol 2.0, whose messages name no purpose, handoffs by its role alone."""
    return (
        _FIRST_SENDS.get(role, ()) if sends is None else sends,
        _FIRST_RECEIVES.get(role, ()) if receives is None else receives,
    )


def shared(sends: Collection[str], receives: Collection[str]) -> tuple[str, ...]:
    """What may go from one end to the other, in the order of `PURPOSES`."""
    return tuple(purpose for purpose in PURPOSES if purpose in sends and purpose in receives)


def _without(purposes: tuple[str, ...], left_out: Collection[str]) -> tuple[str, ...]:
    return tuple(purpose for purpose in purposes if purpose not in left_out)
