"""Copies between layouts, in torch and in Triton's interpreter, against loops over tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.model.interpreter import missing_interpreter

from disagg.kernels import ops
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.scales import INT8_NAN, quantise


@pytest.fixture(params=["torch", "triton"], autouse=True)
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    CALLS.clear()
    with forced(request.param):
        yield request.param
    assert {name.split(":")[0] for name in CALLS} <= {request.param, "kernel"}


def memory(num_slots: int, layers: int, heads: int, block_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (num_slots, layers, 2, heads, block_size, dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def places(units: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(units, dtype=torch.int64).reshape(-1, 2)


def walked(
    source: torch.Tensor, source_at: torch.Tensor, target: torch.Tensor, target_at: torch.Tensor, unit: int
) -> torch.Tensor:
    """`target` after the copy, token by token."""
    after = target.clone()
    for (source_slot, source_token), (slot, token) in zip(source_at.tolist(), target_at.tolist(), strict=True):
        for step in range(unit):
            after[slot, :, :, :, token + step] = source[source_slot, :, :, :, source_token + step].to(after.dtype)
    return after


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("from_", "to", "unit"), [(16, 8, 8), (3, 12, 3), (4, 4, 4), (7, 5, 1), (1, 1, 1)])
def test_blocks_of_one_size_become_blocks_of_another(from_: int, to: int, unit: int, dtype: torch.dtype) -> None:
    source, target = memory(9, 2, 3, from_, 5, dtype), memory(11, 2, 3, to, 5, dtype)
    rng = np.random.default_rng(3)
    source_at = places([(int(rng.integers(9)), int(rng.integers(from_ // unit)) * unit) for _ in range(6)])
    every = [(slot, token) for slot in range(11) for token in range(0, to - unit + 1, unit)]
    target_at = places([every[i] for i in rng.permutation(len(every))[:6]])
    expected = walked(source, source_at, target, target_at, unit)
    ops.copy_units(source, source_at, target, target_at, unit)
    assert same_bits(target, expected)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_range_of_heads_goes_to_a_rank_that_holds_fewer(num_heads: int) -> None:
    source, target = memory(5, 3, 4, 8, 16, torch.bfloat16), memory(6, 3, num_heads, 8, 16, torch.bfloat16)
    at, to = places([(1, 0), (4, 0)]), places([(5, 0), (2, 0)])
    before = target.clone()
    ops.copy_units(source[:, :, :, 2 : 2 + num_heads], at, target, to, 8)
    assert same_bits(target[[5, 2]], source[[1, 4]][:, :, :, 2 : 2 + num_heads])
    assert same_bits(target[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_a_range_of_heads_and_layers_leaves_the_others_alone() -> None:
    source, target = memory(4, 1, 2, 4, 3, torch.float32), torch.zeros(4, 5, 2, 6, 4, 3)
    ops.copy_units(source, places([(3, 0)]), target[:, 2:3, :, 3:5], places([(1, 0)]), 4)
    assert torch.equal(target[1, 2, :, 3:5], source[3, 0])
    assert target.count_nonzero() == source[3].numel()


def test_units_survive_the_way_through_staging() -> None:
    pool = memory(7, 2, 3, 16, 10, torch.float16)
    at = places([(6, 8), (1, 0), (3, 8)])
    staging = torch.empty(3, 2, 2, 3, 8, 10, dtype=torch.float16)
    rows = places([(0, 0), (1, 0), (2, 0)])
    ops.copy_units(pool, at, staging, rows, 8)
    assert same_bits(staging[1], pool[1, :, :, :, :8])
    other = torch.zeros_like(pool)
    ops.copy_units(staging, rows, other, at, 8)
    assert same_bits(other[6, :, :, :, 8:], pool[6, :, :, :, 8:])
    assert other[6, :, :, :, :8].count_nonzero() == other[0].count_nonzero() == 0


def test_any_order_of_axes_is_addressed_by_strides() -> None:
    foreign = memory(4, 2, 2, 8, 6, torch.float32).permute(0, 4, 2, 1, 3, 5).contiguous().permute(0, 3, 2, 4, 1, 5)
    turned = memory(4, 2, 2, 8, 6, torch.float32).transpose(4, 5).contiguous().transpose(4, 5)
    assert not foreign.is_contiguous()
    target = torch.zeros_like(turned)
    assert target.stride(5) != 1
    at = places([(2, 0), (0, 0)])
    ops.copy_units(foreign, at, target, at, 8)
    assert torch.equal(target[[0, 2]], turned[[0, 2]])


@pytest.mark.parametrize(
    ("from_", "to"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float32),
    ],
)
def test_formats_convert_as_torch_converts(from_: torch.dtype, to: torch.dtype, served: str) -> None:
    source, target = memory(3, 2, 2, 4, 16, from_), torch.zeros(3, 2, 2, 2, 4, 16, dtype=to)
    at = places([(0, 0), (2, 0)])
    ops.copy_units(source, at, target, at, 4)
    expected = source[[0, 2]].to(to)
    if served == "triton" and (from_, to) == (torch.float32, torch.bfloat16):
        # The interpreter cuts bits off where hardware rounds to the nearest: tests/gpu compares those exactly.
        torch.testing.assert_close(target[[0, 2]], expected, rtol=2**-7, atol=0)
    else:
        assert same_bits(target[[0, 2]], expected)


def test_scaled_eight_bits_are_read_as_stored_times_scale() -> None:
    source = memory(3, 2, 2, 4, 16, torch.float8_e4m3fn)
    scales = 0.5 + torch.rand(2, 2, 2)
    target = torch.zeros(3, 2, 2, 2, 4, 16)
    at = places([(1, 0)])
    ops.copy_units(source, at, target, at, 4, source_scales=scales)
    assert torch.equal(target[1], source[1].float() * scales[..., None, None])


def test_to_eight_bits_finite_numbers_saturate_and_others_become_nan(served: str) -> None:
    source, target = torch.zeros(2, 1, 2, 1, 1, 4), torch.zeros(2, 1, 2, 1, 1, 4).to(torch.float8_e4m3fn)
    source[1, 0, 0, 0, 0] = torch.tensor([1e9, -1e9, torch.inf, 0.0303])
    at, scales = places([(1, 0)]), torch.full((1, 2, 1), 0.01)
    if served == "triton":
        with pytest.raises(RuntimeError, match=r"converts to torch\.float8_e4m3fn wrongly"):
            ops.copy_units(source, at, target, at, 1, target_scales=scales)
        return
    ops.copy_units(source, at, target, at, 1, target_scales=scales)
    found = target[1, 0, 0, 0, 0].float()
    assert found[[0, 1, 3]].tolist() == [448, -448, 3]
    assert found[2].isnan()
    assert torch.isnan(quantise(torch.tensor(torch.nan), torch.float8_e4m3fn, None).float())


@pytest.mark.parametrize(("from_", "to"), [(torch.float32, torch.int8), (torch.int8, torch.bfloat16)])
def test_int8_is_converted_by_its_scales(from_: torch.dtype, to: torch.dtype) -> None:
    source = (memory(3, 2, 2, 4, 16, torch.float32) * 30).to(from_)
    target = torch.zeros(3, 2, 2, 2, 4, 16, dtype=to)
    scales, at = 0.1 + torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(2)), places([(1, 0)])
    if to == torch.int8:
        source[1, 0, 0, 0, 0, :3] = torch.tensor([1e9, -1e9, torch.nan])
        ops.copy_units(source, at, target, at, 4, target_scales=scales)
        assert torch.equal(target[1], quantise(source[1], to, scales[..., None, None]))
        assert target[1, 0, 0, 0, 0, :3].tolist() == [127, -127, INT8_NAN]
        return
    source[1, 0, 0, 0, 0, 0] = INT8_NAN
    ops.copy_units(source, at, target, at, 4, source_scales=scales)
    exact = source[1].float() * scales[..., None, None]
    assert target[1, 0, 0, 0, 0, 0].isnan()
    target[1, 0, 0, 0, 0, 0] = exact[0, 0, 0, 0, 0]
    torch.testing.assert_close(target[1].float(), exact, rtol=2**-7, atol=0)  # as above, of the interpreter


def test_copying_no_unit_changes_nothing() -> None:
    target = torch.zeros(2, 1, 2, 1, 4, 3)
    ops.copy_units(memory(2, 1, 1, 4, 3, torch.float32), places([]), target, places([]), 4)
    assert target.count_nonzero() == 0


def test_layouts_that_do_not_match_are_refused() -> None:
    source, at = memory(2, 1, 2, 4, 3, torch.float32), places([(0, 0)])
    with pytest.raises(AssertionError, match=r"\(2, 1, 2, 2, 4, 3\) to \(2, 1, 2, 1, 4, 3\)"):
        ops.copy_units(source, at, source[:, :, :, :1], at, 4)
    with pytest.raises(AssertionError):
        ops.copy_units(source, at, source, at, 5)


@pytest.mark.parametrize("nbytes", [1, 13, 24, 4096, 40_000])
def test_scatter_undoes_gather(nbytes: int) -> None:
    slots = torch.randint(0, 256, (11, nbytes), dtype=torch.uint8)
    chosen = torch.tensor([7, 2, 10])
    staging = ops.gather_slots(slots, chosen, torch.empty(3, nbytes, dtype=torch.uint8))
    assert torch.equal(staging, slots[chosen])
    other = torch.zeros_like(slots)
    ops.scatter_slots(other, chosen, staging)
    assert torch.equal(other[chosen], slots[chosen])
    assert other[[0, 1, 3, 4, 5, 6, 8, 9]].sum() == 0


def test_gathering_nothing_changes_nothing() -> None:
    slots = torch.ones(3, 5, dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    staging = ops.gather_slots(slots, none, torch.empty(0, 5, dtype=torch.uint8))
    ops.scatter_slots(slots, none, staging)
    assert slots.sum() == 15


def test_part_of_a_larger_staging_buffer_may_receive() -> None:
    slots = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    staging = torch.zeros(4, 24, dtype=torch.uint8)
    ops.gather_slots(slots, torch.tensor([4, 1]), staging[1:3])
    assert torch.equal(staging[1:3], slots[[4, 1]])
    assert staging[[0, 3]].sum() == 0


# --- negative controls: the comparisons above see what they are for ---------------------------------------------


@pytest.mark.parametrize("wrong", ["a token on", "the next unit", "the next slot", "another target"])
def test_a_shifted_unit_is_noticed(wrong: str) -> None:
    source, target = memory(9, 2, 3, 16, 5, torch.float32), memory(11, 2, 3, 8, 5, torch.float32)
    at, to = places([(1, 0), (7, 0)]), places([(4, 0), (10, 0)])
    expected = walked(source, at, target, to, 8)
    at += places([{"a token on": (0, 1), "the next unit": (0, 8), "the next slot": (1, 0)}.get(wrong, (0, 0))])
    to = to.flip(0).contiguous() if wrong == "another target" else to
    ops.copy_units(source, at, target, to, 8)
    assert not same_bits(target, expected)


def test_a_wrong_range_of_heads_is_noticed() -> None:
    source, target = memory(5, 3, 4, 8, 16, torch.bfloat16), memory(6, 3, 2, 8, 16, torch.bfloat16)
    at = places([(1, 0)])
    ops.copy_units(source[:, :, :, 1:3], at, target, at, 8)
    assert not same_bits(target[1], source[1][:, :, 2:4])


def test_slots_gathered_or_scattered_in_another_order_are_noticed() -> None:
    slots = torch.randint(0, 256, (11, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([7, 2, 10])
    staging = ops.gather_slots(slots, chosen.flip(0), torch.empty(3, 24, dtype=torch.uint8))
    assert not torch.equal(staging, slots[chosen])
    other = torch.zeros_like(slots)
    ops.scatter_slots(other, chosen, staging)
    assert not torch.equal(other[chosen], slots[chosen])
