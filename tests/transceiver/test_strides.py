"""Layouts as strides: ours and foreign ones, element by element against the tensors they describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from disagg.cache.layout import LayerSpec, derive_layout
from disagg.transceiver.layout.strides import GroupStrides, Half, Layout, slot_strides
from disagg.transceiver.memory.foreign_layout import foreign_layout
from disagg.transceiver.memory.gather import Area, flat
from disagg.transceiver.wire.messages.values import GroupSemantics

SLOTS, HEADS, TOKENS, DIM = 5, 3, 4, 2
EXTENT = {"s": SLOTS, "h": HEADS, "t": TOKENS, "d": DIM, "k": 2, "D": 2 * DIM}


def numbered(*shape: int) -> torch.Tensor:
    """Every element another number."""
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def element(buffers: list[torch.Tensor], half: Half, s: int, h: int, t: int, d: int) -> float:
    place = half.offset + s * half.slot + h * half.head + t * half.token + d * half.dim
    return float(buffers[half.buffer][place])


def everywhere() -> list[tuple[int, int, int, int]]:
    return [tuple(map(int, index)) for index in np.ndindex(SLOTS, HEADS, TOKENS, DIM)]  # type: ignore[misc]


@pytest.mark.parametrize("axes", ["skthd", "skhtd", "kshtd", "ksthd", "shtdk", "thdks"])
def test_a_tensor_with_an_axis_of_k_and_v(axes: str) -> None:
    tensor = numbered(*(EXTENT[axis] for axis in axes))
    layout = foreign_layout({3: tensor}, axes, dtype="float32")
    assert layout.block_size == TOKENS
    (pair,) = layout.groups[0].halves
    for s, h, t, d in everywhere():
        for k in (0, 1):
            where = {"s": s, "h": h, "t": t, "d": d, "k": k}
            assert element([flat(tensor)], pair[k], s, h, t, d) == tensor[tuple(where[axis] for axis in axes)]


@pytest.mark.parametrize("axes", ["shtD", "sthD"])
def test_k_and_v_packed_in_the_last_axis(axes: str) -> None:
    """vLLM's `(block, head, token, 2*dim)`, and the same with tokens first."""
    tensor = numbered(*(EXTENT[axis] for axis in axes))
    layout = foreign_layout({0: tensor}, axes, dtype="float32")
    k, v = layout.groups[0].halves[0]
    assert layout.groups[0].head_dim == DIM
    for s, h, t, d in everywhere():
        first, second = (h, t) if axes == "shtD" else (t, h)
        assert element([flat(tensor)], k, s, h, t, d) == tensor[s, first, second, d]
        assert element([flat(tensor)], v, s, h, t, d) == tensor[s, first, second, DIM + d]


@pytest.mark.parametrize("axes", ["shtd", "sthd"])
def test_k_and_v_apart_are_two_buffers(axes: str) -> None:
    pair = tuple(numbered(*(EXTENT[axis] for axis in axes)) + 1000 * k for k in (0, 1))
    layout = foreign_layout({0: pair, 1: pair}, axes, dtype="float32")  # type: ignore[dict-item]
    assert [[half.buffer for half in halves] for halves in layout.groups[0].halves] == [[0, 1], [2, 3]]
    for s, h, t, d in everywhere():
        index = (s, h, t, d) if axes == "shtd" else (s, t, h, d)
        for k in (0, 1):
            assert element([flat(one) for one in pair], layout.groups[0].halves[0][k], s, h, t, d) == pair[k][index]


def test_a_view_into_a_larger_tensor_keeps_its_offset() -> None:
    """Engines give each layer a view of one allocation."""
    whole = numbered(2, SLOTS, 2, HEADS, TOKENS, DIM)
    layers: dict[int, Any] = {7: whole[1], 4: whole[0].flip(0)[:2].flip(0)}
    with pytest.raises(ValueError, match="one shape"):
        foreign_layout(layers, "skhtd", dtype="float32")
    view = foreign_layout({7: whole[1]}, "skhtd", dtype="float32")
    assert element([flat(whole[1])], view.groups[0].halves[0][1], 2, 1, 3, 1) == whole[1, 2, 1, 1, 3, 1]


def test_our_slots() -> None:
    specs = [LayerSpec(i, 8 if i % 2 else None, 0, 2, 4, "bfloat16", i) for i in range(5)]
    cache = derive_layout(specs, block_size=4, max_model_len=64)
    for number, group in enumerate(cache.groups):
        pool = cache.pool_of_group[number]
        strides = slot_strides(group, pool, 6, 4)
        tensor = numbered(6, len(group.layers), 2, 2, 4, 4)
        assert tensor.numel() * 2 == 6 * cache.slot_nbytes[pool]
        for i in range(len(group.layers)):
            for k in (0, 1):
                half = strides.halves[i][k]
                assert half.buffer == pool
                buffers = [torch.empty(0)] * pool + [flat(tensor)]
                assert element(buffers, half, 3, 1, 2, 3) == tensor[3, i, k, 1, 2, 3]


def test_our_slots_are_read_in_one_operation_and_foreign_layers_in_one_each() -> None:
    group = GroupSemantics(None, 0, 2, 4, (0, 1, 2))
    specs = [LayerSpec(i, None, 0, 2, 4, "float32", i) for i in range(3)]
    cache = derive_layout(specs, block_size=4, max_model_len=64)
    memory = torch.zeros(6 * cache.slot_nbytes[0], dtype=torch.uint8)
    own = Layout(4, (slot_strides(cache.groups[0], 0, 6, 4),))
    assert Area(own, [memory], 0, group, (0, 3, 0, 2), 2).num_operations == 1
    tensors = {i: torch.zeros(6, 2, 2, 4, 4) for i in range(3)}
    foreign = foreign_layout(dict(tensors), "skhtd", dtype="float32")
    assert Area(foreign, [flat(t) for t in tensors.values()], 0, group, (0, 3, 0, 2), 2).num_operations == 6


@pytest.mark.parametrize("rectangle", [(0, 3, 0, 1), (0, 1, 0, 3), (0, 1, 1, 1), (2, 1, 0, 1)])
def test_a_rectangle_that_this_rank_does_not_hold_is_refused(rectangle: tuple[int, int, int, int]) -> None:
    group = GroupSemantics(None, 0, 4, DIM, (0, 1, 5))
    tensors = {i: numbered(SLOTS, 2, 2, TOKENS, DIM) for i in (0, 1)}
    layout = foreign_layout(dict(tensors), "skhtd", dtype="float32", first_head=2)
    with pytest.raises(ValueError, match="not held here"):
        Area(layout, [flat(t) for t in tensors.values()], 0, group, rectangle, TOKENS)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        ("shtd", (5, 3, 4, 2), "axis `k` or `D`"),
        ("skht", (5, 2, 3, 4), "each of s, h, t and d"),
        ("skhtd", (5, 3, 3, 4, 2), "two entries"),
        ("kshtd", (2, 5, 3, 4), "each of s, h, t and d"),
        ("shtD", (5, 3, 4, 3), "halves of equal size"),
    ],
)
def test_axes_that_do_not_describe_the_tensor_are_refused(axes: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreign_layout({0: torch.zeros(shape)}, axes, dtype="float32")


def test_an_expanded_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="expanded"):
        foreign_layout({0: torch.zeros(5, 2, 1, 4, 2).expand(5, 2, 3, 4, 2)}, "skhtd", dtype="float32")


def test_k_and_v_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="K and V differ"):
        foreign_layout({0: (torch.zeros(5, 3, 4, 2), torch.zeros(5, 3, 4, 4))}, "shtd", dtype="float32")


HALF = Half(0, 0, 8, 4, 1, 1)
ONES = ((1.0, 1.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "KV dtype 'float64'"),
        ({"layers": (1, 0)}, "ascending"),
        ({"layers": (0,)}, "one pair each"),
        ({"dtype": "float16", "scales": (ONES, ONES)}, "fp8 and int8"),
        ({"scales": (ONES,)}, "scales of 1 layers"),
        ({"scales": (ONES, ((1.0,), (1.0, 1.0)))}, "expected 2 for K and for V"),
    ],
)
def test_a_group_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "layers": (0, 1),
        "first_head": 0,
        "num_heads": 2,
        "head_dim": 4,
        "num_slots": 3,
        "dtype": "float8_e4m3fn",
        "halves": ((HALF, HALF), (HALF, HALF)),
    }
    Layout(1, (GroupStrides(**fields),))
    with pytest.raises(ValueError, match=message):
        GroupStrides(**fields | change)
