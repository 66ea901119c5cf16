"""What must be true of a scheduler's sequences after every change, and within a step. `DISAGG_CHECK` asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from disagg.cache.admission import Promises
from disagg.cache.cache import KVCache
from disagg.engine.commands import AttemptKey
from disagg.engine.sequence import LiveSequence, PromptSequence, Stage


def check_sequences(
    live: Mapping[AttemptKey, LiveSequence], waiting: Collection[AttemptKey], promises: Promises, cache: KVCache
) -> None:
    """No sequence holds more than its promise, and one that waits holds nothing. `waiting`: those in a line."""
    for key, sequence in live.items():
        assert sequence.key == key
        if isinstance(sequence, PromptSequence):
            waits = sequence.stage in (Stage.WAITING, Stage.PARKED)
            assert waits == (sequence.cached is None), f"{key}: {sequence.stage.name}"
        if sequence.cached is None:
            assert promises.of(key) is None, f"{key} waits with a promise"
            parked = isinstance(sequence, PromptSequence) and sequence.stage is Stage.PARKED
            assert (key in waiting) != parked, f"{key} holds nothing and waits for nothing"
        else:
            assert key not in waiting, f"{key} waits with blocks"
            _check_promise(sequence, promises, cache)


def _check_promise(sequence: LiveSequence, promises: Promises, cache: KVCache) -> None:
    promised = promises.of(sequence.key)
    assert promised is not None, f"{sequence.key} holds blocks without a promise"
    assert sequence.cached is not None
    held = cache.num_held(sequence.cached)
    assert all(h <= p for h, p in zip(held, promised, strict=True)), f"{sequence.key}: {held} > {promised}"
