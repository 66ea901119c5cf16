"""The plan of a transfer: what two engines say of their blocks, made into the copies that move what must move.

A pure function for callers that know both ends' lists: a connector of a foreign engine, a simulation, the tests.
Workers tell each other ordinals and never slots, so each end of theirs computes its half of this, by the same parts:
`required_ordinals` for what moves, `rectangles` for which layers and heads, `adjacent` for what one copy may span.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from disagg.transceiver.layout.block_lists import Table, cached_blocks, final_span, table_of_segments, table_of_suffix
from disagg.transceiver.layout.cut import Ints, Rectangle, pair_units, required_ordinals, unit_size
from disagg.transceiver.layout.ranks import rectangles
from disagg.transceiver.layout.runs import adjacent
from disagg.transceiver.wire.messages.values import Geometry


@dataclass(frozen=True, slots=True)
class Suffix:
    """A list without an anchor: the resident suffix of the tokens [0, `end`), the prompt and a speculative tail."""

    slots: Sequence[int]
    end: int


@dataclass(frozen=True, slots=True)
class Anchored:
    """Lists with their places: (ordinal of the first block, slots, -1 for a hole). A table is one that begins at 0."""

    segments: Sequence[tuple[int, Sequence[int]]]


BlockList = Suffix | Anchored


@dataclass(frozen=True, slots=True)
class End:
    """One end: how its rank lays out the cache, and per layer group of the model the blocks that it has."""

    geometry: Geometry
    lists: Sequence[BlockList]

    def table(self, number: int, prompt_len: int) -> Table:
        """Of one group. Raises `ValueError` for a list without an anchor of a group with sinks."""
        given, size = self.lists[number], self.geometry.block_size
        if isinstance(given, Anchored):
            return table_of_segments(given.segments, prompt_len, size)
        num_sink_tokens = self.geometry.groups[number].num_sink_tokens
        return table_of_suffix(
            given.slots, prompt_len=prompt_len, block_size=size, num_sink_tokens=num_sink_tokens, end=given.end
        )


@dataclass(frozen=True, slots=True)
class Have:
    """What the receiver needs no more, per group: a cached prefix in tokens, and a set of blocks. Empty = nothing."""

    cached_tokens: Sequence[int] = ()
    held: Sequence[Collection[int]] = ()

    def blocks(self, number: int, block_size: int) -> set[int]:
        prefix = cached_blocks(self.cached_tokens[number], block_size) if self.cached_tokens else 0
        return {*range(prefix), *(self.held[number] if self.held else ())}


@dataclass(frozen=True, slots=True)
class Copy:
    """One operation: `num_tokens` tokens of `rectangle`'s layers and heads, in slot order on both sides.

    From token `source_token` of `source_slot` to `token` of `slot`, and on into the slots that follow.
    """

    group: int
    rectangle: Rectangle
    source_slot: int
    source_token: int
    slot: int
    token: int
    num_tokens: int


def transfer_plan(
    sender: End,
    receiver: End,
    prompt_len: int,
    *,
    have: Have | None = None,
    tokens: range | None = None,
    num_reused: int = 0,
) -> tuple[Copy, ...]:
    """The copies from one rank to another, by group and ordinal, adjacent slots at once.

    `tokens`: only what becomes final when the sender has computed these of the prompt, after `num_reused` that it had;
    None = all. What neither end has a slot for is left out. Raises `ValueError` for geometries that do not convert.
    """
    sizes = sender.geometry.block_size, receiver.geometry.block_size
    unit, known = unit_size(*sizes), have or Have()
    plan: list[Copy] = []
    for number, rectangle in enumerate(rectangles(sender.geometry, receiver.geometry)):
        if rectangle is None:
            continue
        group = receiver.geometry.groups[number]
        required = required_ordinals(group, prompt_len, unit, known.blocks(number, sizes[1]), sizes[1])
        if tokens is not None:
            span = final_span(tokens.start, tokens.stop, prompt_len, num_reused, sizes[0])
            blocks = required * unit // sizes[0]
            required = required[(span.start <= blocks) & (blocks < span.stop)]
        tables = sender.table(number, prompt_len), receiver.table(number, prompt_len)
        plan += _copies(number, rectangle, required, unit, *zip(tables, sizes, strict=True))
    return tuple(plan)


def _copies(
    group: int, rectangle: Rectangle, required: Ints, unit: int, source: tuple[Table, int], target: tuple[Table, int]
) -> Iterator[Copy]:
    """Of one group; each end gives (table, block size)."""
    found = pair_units(required, unit, source, target)
    places = (
        (slots * size + tokens) // unit
        for slots, tokens, size in (
            (found.source_slots, found.source_tokens, source[1]),
            (found.slots, found.tokens, target[1]),
        )
    )
    for start, stop in adjacent(np.zeros_like(found.slots), *places):
        yield Copy(
            group,
            rectangle,
            int(found.source_slots[start]),
            int(found.source_tokens[start]),
            int(found.slots[start]),
            int(found.tokens[start]),
            (stop - start) * unit,
        )
