"""The whole planner, from lists to copies, against a walk over token positions; and that the walk would notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from support.oracles.list_oracle import Listed, ListedGroup, ListedPrompt, Place, expected, is_read_later, num_runs

from disagg.transceiver.layout import block_lists as compact
from disagg.transceiver.library import plan_copies as copies
from disagg.transceiver.library.plan_copies import Anchored, BlockList, Copy, End, Have, Suffix, transfer_plan
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics

# --- prompts ------------------------------------------------------------------------------------------------------


@st.composite
def prompts(draw: st.DrawFn) -> ListedPrompt:
    prompt_len = draw(st.integers(1, 48))
    block, factor = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 2, 3]))
    sender_block, receiver_block = draw(st.permutations([block, block * factor]))
    num_reused = draw(st.integers(0, prompt_len - 1))
    cuts = draw(st.sets(st.integers(num_reused + 1, prompt_len), max_size=4)) | {prompt_len}
    shape = ListedPrompt(
        prompt_len, sender_block, receiver_block, (), num_reused, tuple(pairwise([num_reused, *sorted(cuts)]))
    )
    groups = [draw(listed_groups(shape)) for _ in range(draw(st.integers(1, 2)))]
    return ListedPrompt(prompt_len, sender_block, receiver_block, tuple(groups), num_reused, shape.chunks)


@st.composite
def listed_groups(draw: st.DrawFn, prompt: ListedPrompt) -> ListedGroup:
    window = draw(st.none() | st.integers(1, 30))
    sinks = 0 if window is None else draw(st.sampled_from([0, 0, 1, 3, 9]))
    bare = ListedGroup(window, sinks, Listed({}, 0, True), Listed({}, 0, True), 0, frozenset())
    sides = [
        draw(listings(prompt, bare, size, is_anchored=bool(sinks) or draw(st.booleans())))
        for size in (prompt.sender_block, prompt.receiver_block)
    ]
    cached = draw(st.sampled_from([0, 0, prompt.prompt_len]) | st.integers(0, prompt.prompt_len + prompt.sender_block))
    held = draw(st.frozensets(st.integers(0, prompt.prompt_len // prompt.receiver_block), max_size=2))
    return ListedGroup(window, sinks, *sides, cached, held)


@st.composite
def listings(draw: st.DrawFn, prompt: ListedPrompt, group: ListedGroup, size: int, *, is_anchored: bool) -> Listed:
    """What a side has: eviction lags behind, a speculative tail is there already, and an anchored list has holes."""
    end = prompt.prompt_len + draw(st.sampled_from([0, 0, 1, size, 2 * size + 1]))
    lag, num_blocks = draw(st.sampled_from([0, 0, 1, size, prompt.prompt_len])), -(-end // size)
    earlier = ListedPrompt(max(0, prompt.prompt_len - lag), prompt.sender_block, prompt.receiver_block, (), 0, ())
    resident = {
        block
        for block in range(num_blocks)
        for token in range(block * size, block * size + size)
        if token >= earlier.prompt_len or is_read_later(earlier, group, token)
    }
    if is_anchored:
        resident -= draw(st.frozensets(st.integers(0, num_blocks - 1), max_size=2))
    elif resident:  # an unanchored list is a suffix, and may begin later still
        resident = set(range(min(min(resident) + draw(st.sampled_from([0, 0, 1, 3])), num_blocks), num_blocks))
    slots = draw(slots_for(len(resident)))
    return Listed(dict(zip(sorted(resident), slots, strict=True)), end, is_anchored)


@st.composite
def slots_for(draw: st.DrawFn, count: int) -> list[int]:
    """In order, in reverse, or in order with one out of place: runs of every length."""
    first = draw(st.integers(0, 9))
    slots = list(range(first, first + count))
    order = draw(st.sampled_from(["up", "up", "down", "swapped"]))
    if order == "swapped" and count > 1:
        at = draw(st.integers(0, count - 2))
        slots[at : at + 2] = reversed(slots[at : at + 2])
    return slots[::-1] if order == "down" else slots


# --- the planner's view ---------------------------------------------------------------------------------------------


def given_list(listed: Listed, seed: int) -> BlockList:
    """As an engine would give it: the slots alone, a table with holes, or pieces with their places."""
    if not listed.is_anchored:
        return Suffix(list(listed.slots.values()), listed.end)
    cuts, pieces = Random(seed), list[tuple[int, list[int]]]()
    for block, slot in listed.slots.items():
        if pieces and pieces[-1][0] + len(pieces[-1][1]) == block and cuts.random() < 0.8:
            pieces[-1][1].append(slot)
        elif pieces and cuts.random() < 0.3:
            hole = block - pieces[-1][0] - len(pieces[-1][1])
            pieces[-1][1].extend([-1] * hole + [slot])
        else:
            pieces.append((block, [slot]))
    return Anchored(pieces)


def plan_of(prompt: ListedPrompt, chunk: tuple[int, int] | None = None) -> tuple[Copy, ...]:
    groups = tuple(
        GroupSemantics(group.window, group.num_sink_tokens, 1, 1, (layer,)) for layer, group in enumerate(prompt.groups)
    )
    ends = (
        End(Geometry(size, "float32", groups, ()), [given_list(listed, number) for number, listed in enumerate(lists)])
        for size, lists in (
            (prompt.sender_block, [group.sender for group in prompt.groups]),
            (prompt.receiver_block, [group.receiver for group in prompt.groups]),
        )
    )
    have = Have([group.cached_tokens for group in prompt.groups], [group.held for group in prompt.groups])
    tokens = None if chunk is None else range(*chunk)
    return transfer_plan(*ends, prompt.prompt_len, have=have, tokens=tokens, num_reused=prompt.num_reused)


def copied_by(prompt: ListedPrompt, plan: Sequence[Copy], number: int) -> list[tuple[Place, Place]]:
    """(destination, source) of every token, in the plan's order."""
    found = []
    for copy in plan:
        for offset in range(copy.num_tokens) if copy.group == number else ():
            to, source = copy.token + offset, copy.source_token + offset
            found.append(
                (
                    (copy.slot + to // prompt.receiver_block, to % prompt.receiver_block),
                    (copy.source_slot + source // prompt.sender_block, source % prompt.sender_block),
                )
            )
    return found


def agrees(prompt: ListedPrompt) -> bool:
    """Does the planner copy what the walk finds, each token once, in as few copies, whole and chunk by chunk?"""
    for chunk in (None, *prompt.chunks):
        plan = plan_of(prompt, chunk)
        for number, group in enumerate(prompt.groups):
            wanted = expected(prompt, group, chunk)
            if copied_by(prompt, plan, number) != list(wanted.items()):
                return False
            if sum(copy.group == number for copy in plan) != num_runs(prompt, wanted):
                return False
    return True


@given(prompts())
@settings(max_examples=300)
def test_copies_are_what_walking_the_tokens_finds(prompt: ListedPrompt) -> None:
    assert agrees(prompt)


@given(prompts())
def test_the_chunks_of_a_prompt_copy_everything_exactly_once(prompt: ListedPrompt) -> None:
    for number in range(len(prompt.groups)):
        whole = copied_by(prompt, plan_of(prompt), number)
        parts = [pair for chunk in prompt.chunks for pair in copied_by(prompt, plan_of(prompt, chunk), number)]
        assert parts == whole
        assert len({destination for destination, _ in whole}) == len(whole)


# --- negative controls ----------------------------------------------------------------------------------------------


def of_another_window(by: int) -> Callable[..., Any]:
    def required_ordinals(group: GroupSemantics, *options: Any) -> Any:
        window = group.window and max(1, group.window + by)
        return plain_required(GroupSemantics(window, group.num_sink_tokens, 1, 1, (0,)), *options)

    return required_ordinals


def without_sinks(group: GroupSemantics, *options: Any) -> Any:
    return plain_required(GroupSemantics(group.window, 0, 1, 1, (0,)), *options)


def held_in_units(group: Any, prompt_len: int, unit: int, held: Any, held_block_size: int) -> Any:
    return plain_required(group, prompt_len, unit, held, unit)


def all_that_is_resident(group: Any, prompt_len: int, unit: int, held: Any, held_block_size: int) -> Any:
    return plain_required(GroupSemantics(None, 0, 1, 1, (0,)), prompt_len, unit, held, held_block_size)


def suffix_of_the_prompt(slots: Sequence[int], **options: Any) -> Any:
    return plain_suffix(slots, **options | {"end": options["prompt_len"]})


def segments_one_later(segments: Any, *options: Any) -> Any:
    return plain_segments([(first + 1, slots) for first, slots in segments], *options)


def rounded_up(num_cached_tokens: int, block_size: int) -> int:
    return -(-num_cached_tokens // block_size)


def span_one_short(*options: Any) -> range:
    span = plain_span(*options)
    return range(span.start, max(span.start, span.stop - 1))


def span_without_the_reused(start: int, end: int, prompt_len: int, num_reused: int, block_size: int) -> range:
    return plain_span(start, end, prompt_len, -1, block_size)


def span_that_rounds_up(start: int, end: int, prompt_len: int, num_reused: int, block_size: int) -> range:
    return plain_span(start, -(-end // block_size) * block_size, prompt_len, num_reused, block_size)


def no_runs(pools: Any, *columns: Any) -> list[tuple[int, int]]:
    return list(pairwise(range(len(pools) + 1)))


def runs_of_one_side(pools: Any, source: Any, destination: Any) -> Any:
    return plain_adjacent(pools, destination)


def places_swapped(required: Any, unit: int, source: Any, destination: Any) -> Any:
    found = plain_pairs(required, unit, source, destination)
    return type(found)(found.ordinals, found.source_slots, found.source_tokens, np.roll(found.slots, 1), found.tokens)


plain_required, plain_adjacent, plain_pairs = copies.required_ordinals, copies.adjacent, copies.pair_units
plain_suffix, plain_segments, plain_span = compact.table_of_suffix, compact.table_of_segments, compact.final_span

MUTANTS: dict[str, tuple[str, Any]] = {
    "a window one wider": ("required_ordinals", of_another_window(1)),
    "a window one narrower": ("required_ordinals", of_another_window(-1)),
    "no sinks": ("required_ordinals", without_sinks),
    "held blocks taken for units": ("required_ordinals", held_in_units),
    "all that is resident": ("required_ordinals", all_that_is_resident),
    "a suffix that ends with the prompt": ("table_of_suffix", suffix_of_the_prompt),
    "segments one block later": ("table_of_segments", segments_one_later),
    "a cached prefix rounded up": ("cached_blocks", rounded_up),
    "a chunk one block short": ("final_span", span_one_short),
    "a reused prefix that stays behind": ("final_span", span_without_the_reused),
    "a partial block before it is full": ("final_span", span_that_rounds_up),
    "every unit by itself": ("adjacent", no_runs),
    "runs of one side only": ("adjacent", runs_of_one_side),
    "destinations one further": ("pair_units", places_swapped),
}
LOOK = settings(max_examples=3000, derandomize=True, database=None, phases=[Phase.generate], deadline=None)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planner_that_is_off_by_one_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, wrong = MUTANTS[name]
    monkeypatch.setattr(copies, part, wrong)
    find(prompts(), lambda prompt: not agrees(prompt), settings=LOOK)  # raises when there is none


def test_the_finder_of_mistakes_finds_none_in_the_planner_itself() -> None:
    with pytest.raises(Exception, match="No examples"):
        find(prompts(), lambda prompt: not agrees(prompt), settings=settings(LOOK, max_examples=300))
