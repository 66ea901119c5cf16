"""The kernels as a GPU runs them, compiled: results, exact conversions, and who served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.oracles.attention_world import CASES, MIXED, Case, World

from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.qkv import Rotary, head_norms
from disagg.kernels.scales import KVScales, quantise
from disagg.kernels.workspace import Workspace

pytestmark = pytest.mark.gpu
CUDA = "cuda"


@pytest.fixture(autouse=True)
def compiled_kernels_serve() -> Iterator[None]:
    from disagg.kernels.triton import backend as triton_backend

    assert not triton_backend.INTERPRETED, "TRITON_INTERPRET is set: this would test the interpreter"
    CALLS.clear()
    yield
    assert not [name for name in CALLS if name.startswith("torch:")]
    assert [name for name in CALLS if name.startswith("kernel:")]


def assert_agrees(case: Case, tolerance: float) -> None:
    world = World(case, CUDA)
    np.testing.assert_allclose(world.actual(), world.expected(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_attention_agrees_with_a_dense_oracle(name: str) -> None:
    assert_agrees(replace(CASES[name], unseen=float("nan")), 1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("window", [None, 50])
def test_large_heads(head_dim: int, dtype: torch.dtype, tolerance: float, window: int | None) -> None:
    case = Case(((130, 1), (700, 1), (90, 37), (0, 70)), 16, window, 3 if window else 0, 2, 4, head_dim, dtype=dtype)
    assert_agrees(replace(case, unseen=float("nan")), tolerance)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
def test_eight_bit_kv(stored: torch.dtype, scaled: bool) -> None:
    assert_agrees(Case(MIXED, window=11, dtype=torch.bfloat16, stored=stored, scaled=scaled), 3e-2)


def test_int8_kv() -> None:
    assert_agrees(Case(MIXED, window=11, dtype=torch.bfloat16, stored=torch.int8, scaled=True), 3e-2)


def test_splits_and_their_merge() -> None:
    assert_agrees(Case(((3000, 1), (5, 1)), 16, head_dim=64, num_kv_heads=1, sink_logits=True), 1e-5)
    assert CALLS["kernel:decode_attention_split"] == CALLS["kernel:merge_splits"] == 1


def memory(dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(9, 2, 2, 4, 16, 24, generator=torch.Generator().manual_seed(1)) * 3).to(CUDA, dtype)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_conversions_are_torchs_bit_for_bit(to: torch.dtype) -> None:
    source, target = memory(torch.float32), torch.zeros(12, 2, 2, 4, 8, 24, device=CUDA).to(to)
    source[3, 0, 0, 0, 0, :3] = torch.tensor([1e9, -1e9, 0.031])
    at = torch.tensor([[3, 0], [7, 8]], device=CUDA)
    ops.copy_units(source, at, target, torch.tensor([[11, 0], [2, 0]], device=CUDA), 8)
    expected = quantise(torch.stack([source[3, ..., :8, :], source[7, ..., 8:, :]]), to, None)
    assert torch.equal(target[[11, 2]].contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_slots_move_whole_and_bit_for_bit() -> None:
    slots = torch.randint(0, 256, (40, 3 << 14), dtype=torch.uint8, device=CUDA)
    chosen = torch.randperm(40, device=CUDA)[:17]
    staging = ops.gather_slots(slots, chosen, torch.empty(17, 3 << 14, dtype=torch.uint8, device=CUDA))
    assert torch.equal(staging, slots[chosen])
    other = torch.zeros_like(slots)
    ops.scatter_slots(other, chosen, staging)
    assert torch.equal(other[chosen], slots[chosen])


@pytest.mark.parametrize(
    ("stored", "scaled"),
    [(torch.bfloat16, False), (torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True), (torch.int8, True)],
)
def test_the_fused_step_is_that_of_torch(stored: torch.dtype, scaled: bool) -> None:
    torch.manual_seed(3)
    tables = [np.array([3, 5, 9], np.int32), np.array([4, 8], np.int32)]
    batch = PagedBatch((QueryRun(tables[0], 33, 3), QueryRun(tables[1], 16, 1)), 16, None, 0)
    pools = [torch.zeros(10, 2, 2, 16, 80, device=CUDA).to(stored) for _ in range(2)]
    angles = torch.rand(4, 20, device=CUDA) * 6
    norms = head_norms(torch.rand(80, device=CUDA), torch.rand(80, device=CUDA), None, epsilon=1e-6)
    qkv, bias = (torch.randn(size, device=CUDA).bfloat16() for size in ((4, 8 * 80), (8 * 80,)))
    counters = [torch.zeros((), dtype=torch.int64, device=CUDA) for _ in range(2)]
    halves = [torch.tensor(half, device=CUDA) for half in ([0.002, 0.05], [0.04, 0.008])]  # some saturate
    outs = []
    for name, pool, counter in zip(("triton", "torch"), pools, counters, strict=True):
        scales = KVScales(*halves, counter) if scaled else None
        with forced(name):
            plan = ops.plan(batch, pool, torch.bfloat16, Workspace())
            rotary = Rotary(angles.cos(), angles.sin())
            out = ops.preprocess_qkv(qkv, pool, plan, num_heads=4, bias=bias, norms=norms, angles=rotary, scales=scales)
        outs.append(out.float())
    for name in [name for name in CALLS if name.startswith("torch:")]:
        del CALLS[name]
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=2e-2)
    step = 1.01 if stored == torch.int8 else 2e-2  # what two roundings may differ by
    torch.testing.assert_close(pools[0].float(), pools[1].float(), rtol=0.13, atol=step)
    assert abs(int(counters[0]) - int(counters[1])) <= 1
    assert int(counters[0] > 0) == scaled
