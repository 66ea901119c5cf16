"""KV between number formats: exact where it can be, within its bound where not, never silently wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from disagg.transceiver.layout.strides import FP8, INT8
from disagg.transceiver.memory.convert import (
    FP8_ABSOLUTE,
    FP8_RELATIVE,
    INT8_ABSOLUTE,
    is_lossless,
    narrow,
    widen,
    wire_dtype,
)
from disagg.transceiver.memory.foreign_layout import foreign_layout
from disagg.transceiver.memory.gather import Area, Packer, Unpacker, digests, flat
from disagg.transceiver.wire.messages.values import GroupSemantics

LAYERS, SLOTS, HEADS, TOKENS, DIM = 2, 6, 3, 4, 8
GROUP = GroupSemantics(None, 0, HEADS, DIM, tuple(range(LAYERS)))
WHOLE = (0, LAYERS, 0, HEADS)
UNITS = np.array([4, 1, 2]), np.array([0, 2, 0])
ROUNDING = 1 + 2.0**-20  # float32's own, on top of a bound that ties reach exactly


def scales_of(seed: int) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    values = np.random.default_rng(seed).uniform(0.01, 0.2, (LAYERS, 2, HEADS)).astype(np.float32)
    return tuple((tuple(map(float, pair[0])), tuple(map(float, pair[1]))) for pair in values)


def make(dtype: str, *, seed: int | None = None, scales: object = ()) -> tuple[list[torch.Tensor], Area]:
    """(tensors per layer, the area over all of them): random numbers, or zeros where there is no seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    shape = (SLOTS, 2, HEADS, TOKENS, DIM)
    values = [
        torch.randn(shape, generator=generator) if seed is not None else torch.zeros(shape) for _ in range(LAYERS)
    ]
    tensors = [(value * 40 if dtype == INT8 else value).to(getattr(torch, dtype)) for value in values]
    layout = foreign_layout(dict(enumerate(tensors)), "skhtd", dtype=dtype, scales=scales)  # type: ignore[arg-type]
    return tensors, Area(layout, [flat(tensor) for tensor in tensors], 0, GROUP, WHOLE, 2)


def cross(source: Area, destination: Area, *, sender_scales: torch.Tensor | None = None) -> tuple[Packer, Unpacker]:
    packer = Packer(source, destination.dtype, destination.scales)
    unpacker = Unpacker(destination, source.dtype, source.scales if sender_scales is None else sender_scales)
    assert packer.unit_nbytes == unpacker.unit_nbytes
    unpacker.scatter(packer.gather(*UNITS), *UNITS)
    return packer, unpacker


def values(area: Area) -> torch.Tensor:
    return widen(area.read(*UNITS), "float32", area.scales)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", FP8, INT8])
def test_equal_formats_cross_bit_for_bit(dtype: str) -> None:
    """Every bit pattern, NaN payloads included: the bytes are never read as numbers."""
    tensors, source = make(dtype)
    for number, tensor in enumerate(tensors):
        raw = flat(tensor).view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=torch.Generator().manual_seed(number), dtype=torch.uint8))
    landed, destination = make(dtype)
    packer, unpacker = cross(source, destination)
    assert unpacker.is_lossless
    for old, new in zip(tensors, landed, strict=True):
        for slot, first in zip(*UNITS, strict=True):
            a, b = (t[slot, :, :, first : first + 2].contiguous().view(torch.uint8) for t in (old, new))
            assert torch.equal(a, b)
    assert digests(unpacker.reread(*UNITS)) == digests(packer.gather(*UNITS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widening_is_exact_and_hashed_from_the_destination(dtype: str) -> None:
    _, source = make(dtype, seed=1)
    _, destination = make("float32")
    packer, unpacker = cross(source, destination)
    assert packer.wire_dtype == dtype
    assert torch.equal(values(source), values(destination))
    assert digests(unpacker.reread(*UNITS)) == digests(packer.gather(*UNITS))


@pytest.mark.parametrize(
    ("sender", "receiver", "wire", "step"),
    [
        ("float32", "bfloat16", "bfloat16", 2.0**-8),
        ("float32", "float16", "float16", 2.0**-11),
        ("float16", "bfloat16", "float16", 2.0**-8),
        ("bfloat16", "float16", "bfloat16", 2.0**-11),
    ],
)
def test_narrowing_loses_half_a_step_at_most(sender: str, receiver: str, wire: str, step: float) -> None:
    _, source = make(sender, seed=2)
    _, destination = make(receiver)
    packer, unpacker = cross(source, destination)
    assert (packer.wire_dtype, unpacker.is_lossless) == (wire, False)
    old, new = values(source), values(destination)
    assert ((new - old).abs() <= torch.maximum(step * old.abs(), torch.tensor(2.0**-24))).all()
    assert not torch.equal(old, new) or receiver == "float16"


def within_bound(old: torch.Tensor, new: torch.Tensor, scales: torch.Tensor) -> bool:
    bound = torch.maximum(FP8_RELATIVE * old.abs(), FP8_ABSOLUTE * scales)
    return bool(((new - old).abs() <= ROUNDING * bound).all())


@pytest.mark.parametrize("sender", ["float32", "float16", "bfloat16"])
def test_fp8_stays_within_its_bound_and_a_scale_wrong_by_two_does_not(sender: str) -> None:
    _, source = make(sender, seed=3)
    _, destination = make(FP8, scales=scales_of(4))
    packer, _ = cross(source, destination)
    assert destination.scales is not None
    assert packer.wire_dtype == FP8
    assert packer.num_saturated == 0
    assert within_bound(values(source), values(destination), destination.scales)
    for wrong in (2.0, 0.5):
        misread = widen(destination.read(*UNITS), "float32", wrong * destination.scales)
        assert not within_bound(values(source), misread, destination.scales)


@pytest.mark.parametrize("receiver", ["float32", "bfloat16", FP8])
def test_fp8_leaves_with_its_own_scales(receiver: str) -> None:
    """fp8 crosses as it is stored; the receiver applies the sender's scales, then its own where it has other ones."""
    _, source = make(FP8, seed=5, scales=scales_of(6))
    _, destination = make(receiver, scales=scales_of(7) if receiver == FP8 else ())
    packer, unpacker = cross(source, destination)
    assert packer.wire_dtype == FP8
    assert not unpacker.is_lossless
    scales = torch.tensor(0.0) if destination.scales is None else destination.scales
    assert within_bound(values(source), values(destination), scales)
    assert source.scales is not None
    _, again = make(receiver, scales=scales_of(7) if receiver == FP8 else ())
    cross(source, again, sender_scales=2 * source.scales)
    assert not within_bound(values(source), values(again), scales)


def within_half_a_step(old: torch.Tensor, new: torch.Tensor, scales: torch.Tensor) -> bool:
    limit = old.clamp(-127 * scales, 127 * scales)  # numbers beyond the range become its ends
    return bool(((new - limit).abs() <= ROUNDING * INT8_ABSOLUTE * scales).all())


@pytest.mark.parametrize("sender", ["float32", "bfloat16", FP8, INT8])
def test_int8_stays_within_half_a_step_and_a_scale_wrong_by_two_does_not(sender: str) -> None:
    """From what is wider it is made here, from other eight bits it is made there, by the sender's scales first."""
    _, source = make(sender, seed=3, scales=scales_of(6) if sender in (FP8, INT8) else ())
    _, destination = make(INT8, scales=scales_of(4))
    packer, unpacker = cross(source, destination)
    assert packer.wire_dtype == (sender if sender == FP8 else INT8)
    assert not unpacker.is_lossless
    assert destination.scales is not None
    assert within_half_a_step(values(source), values(destination), destination.scales)
    for wrong in (2.0, 0.5):
        misread = widen(destination.read(*UNITS), "float32", wrong * destination.scales)
        assert not within_half_a_step(values(source), misread, destination.scales)


@pytest.mark.parametrize("receiver", ["float32", "bfloat16", FP8])
def test_int8_leaves_with_its_own_scales(receiver: str) -> None:
    _, source = make(INT8, seed=5, scales=scales_of(6))
    _, destination = make(receiver, scales=scales_of(7) if receiver == FP8 else ())
    packer, _ = cross(source, destination)
    assert packer.wire_dtype == INT8
    scales = torch.tensor(0.0) if destination.scales is None else destination.scales
    limit = values(source) if destination.scales is None else values(source).clamp(-448 * scales, 448 * scales)
    assert within_bound(limit, values(destination), scales)


def test_fp8_with_equal_scales_is_not_touched() -> None:
    _, source = make(FP8, seed=8, scales=scales_of(9))
    _, destination = make(FP8, scales=scales_of(9))
    _, unpacker = cross(source, destination)
    assert unpacker.is_lossless
    assert torch.equal(source.read(*UNITS).view(torch.uint8), destination.read(*UNITS).view(torch.uint8))


def test_scales_of_one_are_no_scales() -> None:
    ones = tuple(((1.0,) * HEADS, (1.0,) * HEADS) for _ in range(LAYERS))
    _, source = make(FP8, seed=8, scales=ones)
    _, destination = make(FP8)
    assert cross(source, destination)[1].is_lossless
    assert cross(destination, source)[1].is_lossless


def test_the_fp8_bound_over_many_magnitudes() -> None:
    """Every power of two from below fp8's subnormals up to its largest number, at random mantissas."""
    generator = torch.Generator().manual_seed(10)
    old = torch.cat([2.0**e * (1 + torch.rand(500, generator=generator)) for e in range(-14, 8)])
    for scale in (1.0, 0.037, 12.5):
        scales = torch.tensor(scale)
        stored, num_saturated = narrow(old * scale, FP8, scales)
        assert num_saturated == 0
        assert within_bound(old * scale, widen(stored, "float32", scales), scales)


@pytest.mark.parametrize(("dtype", "largest"), [(FP8, 448.0), (INT8, 127.0), ("float16", 65504.0)])
def test_what_is_out_of_range_saturates_and_is_counted(dtype: str, largest: float) -> None:
    old = torch.tensor([largest, 2 * largest, -3 * largest, 1.0])
    stored, num_saturated = narrow(old, dtype)
    assert num_saturated == 2
    assert widen(stored, "float32").tolist() == [largest, largest, -largest, 1.0]


def test_saturation_is_counted_on_either_end() -> None:
    tensors, source = make("bfloat16", seed=11)
    tensors[1][4, 0, 0, 0, 0] = 1e6
    _, destination = make(FP8)
    assert cross(source, destination)[0].num_saturated == 1
    _, half = make("float16")
    assert cross(source, half)[1].num_saturated == 1


@pytest.mark.parametrize("dtype", [FP8, INT8, "float16", "bfloat16"])
def test_what_is_not_finite_stays_not_finite(dtype: str) -> None:
    """A clamp would hide an overflow of the model from the receiver's check."""
    stored, num_saturated = narrow(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]), dtype)
    assert torch.isfinite(widen(stored, "float32")).tolist() == [False, False, False, True]
    assert num_saturated == 0


def test_the_narrower_format_travels() -> None:
    assert wire_dtype("float32", "bfloat16") == wire_dtype("bfloat16", "float32") == "bfloat16"
    assert (wire_dtype("float16", "bfloat16"), wire_dtype("bfloat16", "float16")) == ("float16", "bfloat16")
    assert wire_dtype("float32", FP8) == wire_dtype(FP8, "float32") == FP8


def test_lossless_pairs() -> None:
    formats = ("float32", "float16", "bfloat16", FP8, INT8)
    found = {(a, b) for a in formats for b in formats if is_lossless(a, b)}
    assert found == {(a, a) for a in formats} | {("float16", "float32"), ("bfloat16", "float32")}
    assert not is_lossless(FP8, FP8, same_scales=False)
    assert not is_lossless(INT8, INT8, same_scales=False)
