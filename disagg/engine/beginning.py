"""From where a prompt is computed: from blocks that are cached here, from those that another worker sends, or from 0.

    reuse what is cached -> another worker may have more: ask for it -> room for it, landing -> blocks due are checked
                          -> compute

Each arrow may be skipped. While a prompt waits for another worker's blocks it holds what it found here, and nothing is
computed. Once there is room for them its old blocks are let go: what is cached stays to be found again, should the
transfer fail. Nothing may take the blocks of a prompt that bytes land in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from disagg.cache.cache import CachedSequence, Held, KVCache
from disagg.cache.window import needed_ordinals
from disagg.engine.announce import publish_final_units, units_at
from disagg.engine.commands import (
    BlockSlots,
    EngineEvent,
    PrefixHitEvent,
    PrefixRoomEvent,
    PrefixWantedEvent,
    UnitsFinalEvent,
)
from disagg.engine.recheck import PrefixRecheck
from disagg.engine.sequence import PromptSequence, Stage
from disagg.transceiver.layout.required import runs_of
from disagg.transceiver.wire.messages.values import GroupRuns, UnitName


class Beginnings:
    """What prompts begin with. The prompts are the scheduler's, and have their promises."""

    def __init__(self, cache: KVCache, recheck: PrefixRecheck) -> None:
        self._cache, self._recheck = cache, recheck

    def begin(self, prompt: PromptSequence) -> list[EngineEvent]:
        """Open the prompt's sequence and look for what it may begin with."""
        self._open(prompt)
        self._reuse(prompt, counts=not prompt.has_looked)
        if (wanted := self._wanted(prompt)) is not None:
            prompt.enter(Stage.FETCHING)
            return [wanted]
        return self._check(prompt)

    # --- another worker's blocks ----------------------------------------------------------------------------

    def make_room(self, prompt: PromptSequence, boundary: int) -> PrefixRoomEvent:
        """Hold what is here of the first `boundary` tokens, and slots for the rest; without `slots` there is none."""
        if prompt.stage is not Stage.FETCHING:
            return PrefixRoomEvent(prompt.key, boundary, None)
        assert prompt.cached is not None
        self._cache.close_sequence(prompt.cached)
        cached = self._open(prompt)
        tokens = prompt.token_ids[:boundary]
        held = self._cache.reserve(cached, tokens, capacity=boundary, among=prompt.known_here)
        prompt.enter(Stage.LANDING)
        is_whole = held is not None and self._holds_what_it_said(prompt, boundary, held)
        prompt.awaited = self._missing(cached, boundary, held) if held is not None and is_whole else None
        return PrefixRoomEvent(prompt.key, boundary, prompt.awaited)

    def take_landed(self, prompt: PromptSequence, partial: Sequence[UnitName]) -> list[EngineEvent]:
        """The blocks are verified: register them and compute from there. `partial` lack some of their tokens."""
        if prompt.stage is not Stage.LANDING or prompt.awaited is None:
            return []
        assert prompt.cached is not None
        self._cache.mark_partial(prompt.cached, [(unit.group, unit.ordinal) for unit in partial])
        self._cache.commit(prompt.cached, prompt.token_ids[: prompt.cached.history])
        received = [UnitName(group, ordinal) for group, pairs in enumerate(prompt.awaited) for ordinal, _ in pairs]
        self._recheck.note(units_at(self._cache, prompt.cached, received))
        return self._check(prompt)

    def give_up(self, prompt: PromptSequence) -> list[EngineEvent]:
        """No blocks of another worker come (any more): begin with what is here."""
        if prompt.stage is Stage.LANDING:
            assert prompt.cached is not None
            self._cache.close_sequence(prompt.cached)
            self._open(prompt)
            self._reuse(prompt, counts=False)
        elif prompt.stage is not Stage.FETCHING:
            return []
        return self._check(prompt)

    # --- checks ---------------------------------------------------------------------------------------------

    def end_check(self, prompt: PromptSequence, *, is_right: bool) -> list[EngineEvent]:
        """Go on from the reused blocks, or begin anew: the wrong ones are registered no more."""
        assert prompt.stage is Stage.CHECKING
        if is_right:
            return self._go_on(prompt)
        assert prompt.cached is not None
        self._cache.close_sequence(prompt.cached)
        self._open(prompt)
        self._reuse(prompt, counts=False)
        return self._check(prompt)

    # --- how it is done -------------------------------------------------------------------------------------

    def _open(self, prompt: PromptSequence) -> CachedSequence:
        prompt.cached = self._cache.open(prompt.key, prompt.request.sampling.cache_salt)
        return prompt.cached

    def _missing(self, cached: CachedSequence, length: int, held: Held) -> BlockSlots:
        """(ordinal, slot) of what must come of the first `length` tokens, per group."""
        slots = []
        for table, need, have in zip(cached.tables, self._needed(length), held, strict=True):
            missing = np.setdiff1d(need, have)
            slots.append(tuple(zip(missing.tolist(), table[missing].tolist(), strict=True)))
        return tuple(slots)

    def _holds_what_it_said(self, prompt: PromptSequence, boundary: int, held: Held) -> bool:
        """Of the needed blocks that the source was told to be here, none is gone."""
        said = map(np.intersect1d, self._needed(boundary), prompt.known_here)
        return all(len(some) == len(have) for some, have in zip(said, held, strict=True))

    def _needed(self, length: int) -> Held:
        layout = self._cache.layout
        return tuple(
            needed_ordinals(length, group.window, group.num_sink_tokens, layout.block_size) for group in layout.groups
        )

    def _reuse(self, prompt: PromptSequence, *, counts: bool) -> None:
        assert prompt.cached is not None
        if not prompt.is_scored:  # what is reused has no logits
            self._cache.reuse_prefix(prompt.cached, prompt.token_ids, counts=counts)

    def _wanted(self, prompt: PromptSequence) -> PrefixWantedEvent | None:
        """What to ask another worker for, once per prompt."""
        boundary, prompt.prefix_boundary = prompt.prefix_boundary, 0
        if prompt.is_scored or boundary <= prompt.num_computed or self._cache.prefixes is None:
            return None
        assert prompt.cached is not None
        assert prompt.cached.chain is not None
        match = self._cache.prefixes.match(prompt.cached.chain, prompt.token_ids[:boundary])
        prompt.known_here = tuple(np.flatnonzero(resident) for resident in match.resident)
        held = tuple(GroupRuns(group, runs_of(some)) for group, some in enumerate(prompt.known_here) if len(some))
        return PrefixWantedEvent(prompt.key, boundary, prompt.num_computed, held)

    def _check(self, prompt: PromptSequence) -> list[EngineEvent]:
        """Wait until those of the reused blocks that are due were hashed again, or go on at once."""
        assert prompt.cached is not None
        if due := self._recheck.due(prompt.cached):
            prompt.enter(Stage.CHECKING)
            prompt.check_id += 1
            return [PrefixHitEvent(prompt.key, prompt.check_id, due)]
        return self._go_on(prompt)

    def _go_on(self, prompt: PromptSequence) -> list[EngineEvent]:
        prompt.enter(Stage.COMPUTING)
        if prompt.num_cached_tokens is None:
            prompt.num_cached_tokens = prompt.num_computed
        prompt.num_announced = [0] * self._cache.layout.num_groups
        if not prompt.serves and (units := publish_final_units(self._cache, prompt)):
            return [UnitsFinalEvent(prompt.key, prompt.compute_id, units)]  # reused blocks are final
        return []
