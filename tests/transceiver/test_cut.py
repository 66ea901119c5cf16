"""Between unequal geometries: the planner and the packed path against a walk over every element."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.element_walk import HOLE, Cut, ModelGroup, Rank, expected, make_ranks, needed_tokens, store

from disagg.transceiver.layout.cut import (
    Copies,
    ModelCut,
    Rectangle,
    finer,
    inconvertible_field,
    minimum_nbytes,
    pair_units,
    rectangle,
    required_ordinals,
    unit_nbytes,
    unit_size,
)
from disagg.transceiver.layout.ranks import rank_geometry, rank_layout, rectangles
from disagg.transceiver.layout.strides import FP8, Layout
from disagg.transceiver.library.plan_copies import Anchored, Copy, End, transfer_plan
from disagg.transceiver.memory.convert import FP8_ABSOLUTE, FP8_RELATIVE
from disagg.transceiver.memory.foreign_layout import foreign_layout
from disagg.transceiver.memory.gather import Area, Packer, Unpacker, digests, flat
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics

BLANK = -16.0  # no value of the truth below
AXES = ("skhtd", "skthd", "kshtd", "kthsd", "shtD", "sthD", "shtdk")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


@st.composite
def stages_of(draw: st.DrawFn, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Layers 0..n cut into one to three stages, contiguous, none empty."""
    cuts = sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=2))) if num_layers > 1 else []
    edges = [0, *cuts, num_layers]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(edges))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[ModelGroup], Cut, Cut, int, int]:
    """(groups, sending side, receiving side, prompt length, seed)."""
    num_layers = draw(st.integers(1, 4))
    split = draw(st.integers(0, 2**num_layers - 1))
    groups = []
    for number in (0, 1):  # layers of the two groups interleave as they please
        layers = tuple(layer for layer in range(num_layers) if (split >> layer & 1) == number)
        window = draw(st.sampled_from([None, 1, 3, 8, 11]))
        sinks = 0 if window is None else draw(st.sampled_from([0, 0, 1, 5]))
        if layers:
            groups.append(
                ModelGroup(window, sinks, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 4])), layers)
            )
    block = draw(st.sampled_from([1, 2, 4]))
    factor = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.permutations([block, block * factor]))
    sides = [
        Cut(
            size,
            draw(st.sampled_from(DTYPES)),
            draw(stages_of(num_layers)),
            draw(st.sampled_from([1, 2, 4])),
            draw(st.sampled_from(AXES)),
        )
        for size in sizes
    ]
    return groups, sides[0], sides[1], draw(st.integers(1, 21)), draw(st.integers(0, 2**32 - 1))


@dataclass(frozen=True, order=True)
class Share:
    """What one receiving rank takes of one group from one sending rank."""

    receiver: int
    group: int
    rectangle: Rectangle
    sender: int


def shares(groups: Sequence[GroupSemantics], sender: ModelCut, receiver: ModelCut) -> tuple[Share, ...]:
    """Between all pairs of ranks."""
    found = [
        Share(to, number, part, source)
        for number, group in enumerate(groups)
        for to, source in itertools.product(range(receiver.num_ranks), range(sender.num_ranks))
        if (part := rectangle(group, sender, source, receiver, to)) is not None
    ]
    return tuple(sorted(found))


def side_of(cut: Cut) -> ModelCut:
    return ModelCut(cut.block_size, cut.dtype, cut.stages, cut.tensor_ranks)


def semantics(group: ModelGroup) -> GroupSemantics:
    return GroupSemantics(group.window, group.num_sink_tokens, group.num_kv_heads, group.head_dim, group.layers)


def make_table(rng: np.random.Generator, blocks: set[int], num_blocks: int) -> list[int]:
    """Slots in random order, from 1, for `blocks`; holes elsewhere."""
    slots = iter((1 + rng.permutation(num_blocks)).tolist())
    return [next(slots) if ordinal in blocks else HOLE for ordinal in range(num_blocks)]


def tensors_of(held: Rank) -> list[torch.Tensor]:
    return [held.tensors[layer] for layer in sorted(held.tensors)]


def area(held: Rank, cut: Cut, group: ModelGroup, share: Share, unit: int) -> Area:
    layout: Layout = foreign_layout(
        dict(held.tensors), cut.axes, dtype=cut.dtype, first_head=held.heads[0] if held.heads else 0
    )
    return Area(layout, [flat(t) for t in tensors_of(held)], 0, semantics(group), share.rectangle, unit)


class World:
    """One group on both sides, filled at the sender, blank at the receiver, with the planner's view of it."""

    def __init__(
        self, group: ModelGroup, sender: Cut, receiver: Cut, prompt_len: int, rng: np.random.Generator
    ) -> None:
        self.group, self.cuts, self.unit = group, (sender, receiver), min(sender.block_size, receiver.block_size)
        num_tokens = -(-prompt_len // self.unit) * self.unit
        shape = (len(group.layers), 2, group.num_kv_heads, num_tokens, group.head_dim)
        self.truth = rng.integers(-15, 16, shape).astype(np.float64)
        needed = needed_tokens(group, prompt_len)
        self.units = {token // self.unit for token in needed}
        self.tables = [
            make_table(rng, {token // cut.block_size for token in needed}, -(-prompt_len // cut.block_size))
            for cut in self.cuts
        ]
        num_slots = num_tokens // self.unit + 2
        self.senders = make_ranks(
            group, sender, num_slots, lambda s: torch.full(s, 7.0).to(getattr(torch, sender.dtype))
        )
        self.receivers = make_ranks(
            group, receiver, num_slots, lambda s: torch.full(s, BLANK).to(getattr(torch, receiver.dtype))
        )
        store(group, sender, self.senders, self.tables[0], self.truth)
        self.required = required_ordinals(semantics(group), prompt_len, self.unit)
        tables = [np.array(table, dtype=np.int64) for table in self.tables]
        self.copies = pair_units(
            self.required, self.unit, (tables[0], sender.block_size), (tables[1], receiver.block_size)
        )

    def move(self, share: Share) -> int:
        """Pack at the sender, unpack at the receiver; the bytes that crossed."""
        sender, receiver = self.cuts
        packer = Packer(area(self.senders[share.sender], sender, self.group, share, self.unit), receiver.dtype)
        unpacker = Unpacker(area(self.receivers[share.receiver], receiver, self.group, share, self.unit), sender.dtype)
        moved, c = 0, self.copies
        for part in (slice(first, first + 3) for first in range(0, len(c), 3)):
            rows = packer.gather(c.source_slots[part], c.source_tokens[part])
            unpacker.scatter(rows, c.slots[part], c.tokens[part])
            moved += rows.nbytes
            if unpacker.is_lossless:
                assert digests(unpacker.reread(c.slots[part], c.tokens[part])) == digests(rows)
        assert packer.num_saturated == unpacker.num_saturated == 0
        return moved


@given(worlds())
@settings(deadline=None)
def test_every_receiving_rank_ends_up_with_its_part_of_the_whole_and_nothing_else(
    world: tuple[list[ModelGroup], Cut, Cut, int, int],
) -> None:
    groups, sender, receiver, prompt_len, seed = world
    rng = np.random.default_rng(seed)
    plan = shares([semantics(group) for group in groups], side_of(sender), side_of(receiver))
    for number, group in enumerate(groups):
        one = World(group, sender, receiver, prompt_len, rng)
        assert set(one.required.tolist()) == one.units
        assert len(one.copies) == len(one.required)
        moved = sum(one.move(share) for share in plan if share.group == number)
        wire = "float8_e4m3fn" if "float8_e4m3fn" in (sender.dtype, receiver.dtype) else None
        wire = wire or (sender.dtype if receiver.dtype == "float32" else receiver.dtype)
        least = minimum_nbytes([semantics(group)], [one.required], one.unit, wire)
        assert moved == least * max(1, receiver.tensor_ranks // group.num_kv_heads)
        tokens = {token for token in range(one.truth.shape[3]) if token // one.unit in one.units}
        for held in one.receivers:
            wanted = expected(group, receiver, held, one.tables[1], tokens, one.truth, BLANK)
            for layer, tensor in wanted.items():
                assert torch.equal(held.tensors[layer].float(), tensor.float()), f"layer {layer}"


@given(worlds())
@settings(deadline=None)
def test_copy_rectangles_write_every_required_element_exactly_once(
    world: tuple[list[ModelGroup], Cut, Cut, int, int],
) -> None:
    groups, sender, receiver, prompt_len, seed = world
    for group in groups:
        one = World(group, sender, receiver, prompt_len, np.random.default_rng(seed))
        written = [
            np.zeros((len(group.layers), group.num_kv_heads, one.truth.shape[3]), dtype=int) for _ in one.receivers
        ]
        ordinals = [{slot: ordinal for ordinal, slot in enumerate(table)} for table in one.tables]
        for source, to in itertools.product(geometries([group], sender), geometries([group], receiver)):
            ends = (End(side, [Anchored([(0, table)])]) for side, table in zip((source, to), one.tables, strict=True))
            for copy in transfer_plan(*ends, prompt_len):
                layer, num_layers, head, num_heads = copy.rectangle
                for offset in range(copy.num_tokens):
                    token = token_at(ordinals[1], copy.slot, copy.token + offset, receiver.block_size)
                    assert token == token_at(
                        ordinals[0], copy.source_slot, copy.source_token + offset, sender.block_size
                    )
                    written[to.rank][layer : layer + num_layers, head : head + num_heads, token] += 1
        for held, counts in zip(one.receivers, written, strict=True):
            wanted = np.zeros_like(counts)
            for layer in held.layers:
                for head in held.heads:
                    for unit in one.units:
                        wanted[group.layers.index(layer), head, unit * one.unit : (unit + 1) * one.unit] = 1
            assert np.array_equal(counts, wanted)


def token_at(ordinal_of_slot: dict[int, int], slot: int, token: int, block_size: int) -> int:
    """Position in the prompt of a token that many tokens after the beginning of a slot."""
    return ordinal_of_slot[slot + token // block_size] * block_size + token % block_size


FULL = GroupSemantics(None, 0, 4, 8, (0, 1, 2, 3))


def test_upstreams_example_of_more_receiving_ranks() -> None:
    plan = shares(
        [replace(FULL, num_kv_heads=8)],
        ModelCut(32, "bfloat16", ((0, 1, 2, 3),), 2),
        ModelCut(32, "bfloat16", ((0, 1, 2, 3),), 4),
    )
    assert Share(3, 0, (0, 4, 6, 2), 1) in plan
    assert [share.sender for share in plan] == [0, 0, 1, 1]


def test_replicated_senders_take_turns() -> None:
    """4 heads on 8 sending ranks: every head lies on two ranks, and each serves one of the two receivers of it."""
    plan = shares([FULL], ModelCut(16, "float32", ((0, 1, 2, 3),), 8), ModelCut(16, "float32", ((0, 1, 2, 3),), 8))
    assert [(share.receiver, share.sender) for share in plan] == [(rank, rank) for rank in range(8)]
    plan = shares([FULL], ModelCut(16, "float32", ((0, 1, 2, 3),), 8), ModelCut(16, "float32", ((0, 1, 2, 3),), 4))
    assert [share.sender for share in plan] == [0, 3, 4, 7]


def test_upstreams_example_of_stages() -> None:
    layers = tuple(range(32))
    halves, quarters = (layers[:16], layers[16:]), tuple(layers[i : i + 8] for i in range(0, 32, 8))
    plan = shares([replace(FULL, layers=layers)], ModelCut(16, "float16", halves), ModelCut(16, "float16", quarters))
    assert [(share.receiver, share.sender, share.rectangle[:2]) for share in plan] == [
        (0, 0, (0, 8)),
        (1, 0, (8, 8)),
        (2, 1, (16, 8)),
        (3, 1, (24, 8)),
    ]


def test_adjacent_units_are_one_copy() -> None:
    """Slots in order: a block of 16 into two of 8 and on is one run; a slot out of order begins another."""
    pairs = pair_units(np.arange(6), 8, (np.array([5, 6, 9]), 16), (np.array([3, 4, 5, 6, 7, 8]), 8))
    assert pairs.source_slots.tolist() == [5, 5, 6, 6, 9, 9]
    assert pairs.source_tokens.tolist() == [0, 8, 0, 8, 0, 8]
    sender, receiver = (
        End(Geometry(size, "float32", (FULL,), ()), [Anchored([(0, slots)])])
        for size, slots in ((16, [5, 6, 9]), (8, [3, 4, 5, 6, 7, 8]))
    )
    whole = (0, 4, 0, 4)
    assert transfer_plan(sender, receiver, 48) == (Copy(0, whole, 5, 0, 3, 0, 32), Copy(0, whole, 9, 0, 7, 0, 16))
    assert transfer_plan(sender, replace(receiver, lists=[Anchored([])]), 48) == ()


def test_a_unit_without_a_slot_on_either_side_is_left_out() -> None:
    pairs: Copies = pair_units(np.arange(4), 8, (np.array([2, HOLE]), 16), (np.array([HOLE, 4, 5]), 8))
    assert pairs.ordinals.tolist() == [1]
    assert len(pair_units(np.arange(4), 8, (np.array([2]), 16), (np.arange(1, 5), 8))) == 2  # beyond the shorter table


def test_what_the_receiver_holds_in_its_own_blocks_is_not_required() -> None:
    group = replace(FULL, window=20)
    assert required_ordinals(group, 64, 8).tolist() == [5, 6, 7]
    assert required_ordinals(group, 64, 8, held=[3], held_block_size=16).tolist() == [5]
    assert required_ordinals(FULL, 64, 8, held={0, 1}, held_block_size=16).tolist() == [4, 5, 6, 7]
    assert finer(np.array([1, 3]), 16, 8).tolist() == [2, 3, 6, 7]


def test_unequal_blocks_move_less_than_the_coarser_would() -> None:
    """A window that ends inside a coarse block: the finer unit leaves its other half behind."""
    group = replace(FULL, window=9)
    fine, coarse = (required_ordinals(group, 33, unit) for unit in (8, 16))
    assert minimum_nbytes([group], [fine], 8, "float32") == 2 * 8 * 4 * 2 * 4 * 8 * 4
    assert minimum_nbytes([group], [fine], 8, "float32") < minimum_nbytes([group], [coarse], 16, "float32")
    assert unit_nbytes(group, (0, 2, 0, 1), 8, "float16") == 2 * 2 * 1 * 8 * 8 * 2


ONE = ModelCut(16, "float32", ((0, 1, 2, 3),))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("block_size", replace(ONE, block_size=24)),
        ("block_size", replace(ONE, block_size=0)),
        ("kv_dtype", replace(ONE, dtype="float64")),
        ("tensor_parallel_size", replace(ONE, tensor_parallel_size=3)),
        ("pipeline_parallel_size", replace(ONE, stages=((0, 1), (2,)))),
        ("pipeline_parallel_size", replace(ONE, stages=((0, 1), (1, 2, 3)))),
    ],
)
def test_what_does_not_convert_is_named(field: str, other: ModelCut) -> None:
    assert inconvertible_field([FULL], ONE, other) == field
    assert inconvertible_field([FULL], other, ONE) == field


def test_block_sizes_must_divide() -> None:
    assert unit_size(ONE, replace(ONE, block_size=48)) == 16
    assert inconvertible_field([FULL], ONE, replace(ONE, block_size=48)) is None
    with pytest.raises(ValueError, match="block sizes 16 and 24"):
        unit_size(16, 24)


def test_ranks_beyond_the_heads_hold_copies_of_them() -> None:
    """Four tensor ranks of two heads: consecutive ranks share one, and with as many ranks as heads each has its own."""
    side = ModelCut(4, "float32", ((0, 1),), 4)
    assert [list(side.heads(rank, 2)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [list(side.heads(rank, 4)) for rank in range(4)] == [[0], [1], [2], [3]]
    assert [list(side.heads(rank, 8)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert replace(side, stages=((0,), (1,))).num_ranks == 8


@given(worlds())
@settings(deadline=None)
def test_what_two_ranks_agree_on_is_what_the_plan_of_all_ranks_gives_them(
    world: tuple[list[ModelGroup], Cut, Cut, int, int],
) -> None:
    """Each pair of ranks finds its own part without the others; together they are the plan, and each is held there."""
    groups, sender, receiver, _, _ = world
    plan = shares([semantics(group) for group in groups], side_of(sender), side_of(receiver))
    found = []
    for to, receiving in enumerate(geometries(groups, receiver)):
        for source, sending in enumerate(geometries(groups, sender)):
            for number, part in enumerate(rectangles(sending, receiving)):
                if part is not None:
                    found.append(Share(to, number, part, source))
                    for end in (sending, receiving):
                        pools = [np.zeros(2 * nbytes, np.uint8) for nbytes in end.slot_nbytes]
                        layout = rank_layout(end, [2] * len(pools))
                        Area(layout, pools, number, semantics(groups[number]), part, 1)
    assert tuple(sorted(found)) == plan


def geometries(groups: list[ModelGroup], cut: Cut) -> list[Geometry]:
    whole = Geometry(cut.block_size, cut.dtype, tuple(map(semantics, groups)), ())
    return [
        rank_geometry(whole, rank, tensor_parallel_size=cut.tensor_ranks, stages=cut.stages)
        for rank in range(len(cut.stages) * cut.tensor_ranks)
    ]


scales_of_heads = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]), min_size=4, max_size=4)


@given(worlds(), scales_of_heads, scales_of_heads)
@settings(deadline=None)
def test_fp8_with_scales_of_either_side_lands_within_its_bound_on_every_rank(
    world: tuple[list[ModelGroup], Cut, Cut, int, int], k_scales: list[float], v_scales: list[float]
) -> None:
    """Both sides store fp8, each by scales of its own; heads and layers are dealt out to ranks on both."""
    groups, sender, receiver, prompt_len, seed = world
    sender, receiver = replace(sender, dtype=FP8), replace(receiver, dtype=FP8)
    plan = shares([semantics(group) for group in groups], side_of(sender), side_of(receiver))
    for number, group in enumerate(groups):
        one = World(group, sender, receiver, prompt_len, np.random.default_rng(seed))
        for share in plan:
            if share.group != number:
                continue
            _, num_layers, head, num_heads = share.rectangle
            ours, theirs = (
                torch.tensor([[half[head : head + num_heads]] * 2] * num_layers)[..., None, None]
                for half in (k_scales, v_scales)
            )
            source = area(one.senders[share.sender], sender, group, share, one.unit)
            target = area(one.receivers[share.receiver], receiver, group, share, one.unit)
            source.scales, target.scales = ours, theirs
            rows = Packer(source, FP8, theirs).gather(one.copies.source_slots, one.copies.source_tokens)
            Unpacker(target, FP8, ours).scatter(rows, one.copies.slots, one.copies.tokens)
            sent = source.read(one.copies.source_slots, one.copies.source_tokens).float() * ours
            landed = target.read(one.copies.slots, one.copies.tokens).float() * theirs
            limit = sent.clamp(-448 * theirs, 448 * theirs)  # numbers beyond the range become its ends
            bound = torch.maximum(FP8_RELATIVE * limit.abs(), theirs * FP8_ABSOLUTE)
            assert ((landed - limit).abs() <= bound).all()
