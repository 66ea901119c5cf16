"""Which blocks of a prompt a decode worker may be told of: those it will need that no later chunk writes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.table import HOLE
from disagg.cache.window import needed_ordinals
from disagg.engine.sequence import DecodingSequence, PromptSequence
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.wire.messages.values import UnitName


def publish_final_units(cache: KVCache, prompt: PromptSequence) -> tuple[SourceUnit, ...]:
    """Units of `prompt` that became final since the last call, by group and ordinal; they count as announced after it.

    They are published: peers may read them from here on.

    A block is final when it is full, or when the prompt ends. A block that is needed after the prompt is never stale
    before its end, so every unit reported here still has its slot.
    """
    assert prompt.cached is not None
    units: list[SourceUnit] = []
    for group, table in enumerate(prompt.cached.tables):
        pool = cache.layout.pool_of_group[group]
        ordinals = _newly_final(cache, prompt, group)
        slots = table[ordinals].tolist()
        cache.publish(group, slots)
        generations = cache.pools[pool].generations[slots].tolist()
        units += map(SourceUnit, repeat(group), ordinals, repeat(pool), slots, generations)
    return tuple(units)


def units_at(cache: KVCache, cached: CachedSequence, names: Sequence[UnitName]) -> tuple[SourceUnit, ...]:
    """Where these blocks of a sequence lie; those that it holds no more are left out."""
    units: list[SourceUnit] = []
    for name in names:
        table = cached.tables[name.group]
        slot = int(table[name.ordinal]) if name.ordinal < len(table) else HOLE
        if slot != HOLE:
            pool = cache.layout.pool_of_group[name.group]
            generation = int(cache.pools[pool].generations[slot])
            units.append(SourceUnit(name.group, name.ordinal, pool, slot, generation))
    return tuple(units)


def unannounced(
    cache: KVCache, sequence: PromptSequence | DecodingSequence, first: int, end: int
) -> tuple[SourceUnit, ...]:
    """Where the blocks of these tokens lie in the groups that hold them, without those that a decode worker will be
    told of.
    """
    cached, layout = sequence.cached, cache.layout
    ordinals = range(first // layout.block_size, end // layout.block_size)
    assert cached is not None
    names: list[UnitName] = []
    for number, group in enumerate(layout.groups):
        told: set[int] = set()
        if isinstance(sequence, PromptSequence) and not sequence.serves:
            length = len(sequence.token_ids)
            told.update(needed_ordinals(length, group.window, group.num_sink_tokens, layout.block_size).tolist())
        names += [UnitName(number, ordinal) for ordinal in ordinals if ordinal not in told]
    return units_at(cache, cached, names)


def _newly_final(cache: KVCache, prompt: PromptSequence, group: int) -> list[int]:
    layout, semantics = cache.layout, cache.layout.groups[group]
    size, prompt_len = layout.block_size, prompt.request.num_known
    needed = needed_ordinals(prompt_len, semantics.window, semantics.num_sink_tokens, size)
    end = layout.num_blocks(prompt_len) if prompt.num_remaining == 0 else prompt.num_computed // size
    first, last = prompt.num_announced[group], int(needed.searchsorted(end))
    prompt.num_announced[group] = last
    ordinals: list[int] = needed[first:last].tolist()
    return ordinals
