"""Norms, gated activations and products of the compiled helper, at every width, against torch in float64."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.sampling_rows import widest

from disagg.kernels import native, native_decoder, native_layers, native_matmul
from disagg.kernels.native_layers import GELU_TANH, SILU

pytestmark = pytest.mark.skipif(
    not native_layers.is_loaded(),
    reason="the compiled helper is not loaded: no C compiler when the package was installed, or DISAGG_NATIVE=off",
)
WIDTHS = (1, 7, 16, 33, 64, 250)
ACTIVATIONS = {SILU: torch.nn.functional.silu, GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh")}


@pytest.fixture(params=[0, 256, 512], autouse=True, scope="module")
def width(request: pytest.FixtureRequest) -> Iterator[int]:
    """The widest vectors that the helper may use; a processor without them takes narrower ones."""
    with widest(request.param):
        yield request.param


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
@pytest.mark.parametrize("size", WIDTHS)
def test_a_norm_is_torchs(size: int, scale: float) -> None:
    x, gain = normal(2, 3, size) * scale, normal(size)
    expected = torch.nn.functional.rms_norm(x.double(), (size,), gain.double(), 1e-6)
    torch.testing.assert_close(native_layers.norm(x, gain, 1e-6).double(), expected, rtol=2e-6, atol=1e-30)


def test_rows_of_a_norm_may_lie_anywhere_and_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gain = normal(40, 50)[:, 3:40].transpose(0, 1), normal(40)
    expected = native_layers.norm(x.contiguous(), gain, 1e-6)
    assert torch.equal(native_layers.norm(x, gain, 1e-6), expected)
    monkeypatch.setattr(native_layers, "MAX_QUICK_ELEMENTS", 1)
    monkeypatch.setattr(native_layers, "MIN_ELEMENTS_PER_THREAD", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(native_layers.norm(x, gain, 1e-6), expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = normal(3, 33)
    x[1, 5] = float("nan")
    for made in (native_layers.norm(x, torch.ones(33), 1e-6), native_layers.gate(torch.cat([x, x], 1), SILU)):
        assert made[1].isnan().any()
        assert made[[0, 2]].isfinite().all()


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("size", WIDTHS)
def test_a_gate_is_torchs(size: int, kind: int) -> None:
    both = normal(5, 2 * size) * 4
    expected = ACTIVATIONS[kind](both[:, :size].double()) * both[:, size:].double()
    torch.testing.assert_close(native_layers.gate(both, kind).double(), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_extreme_gates_are_zero_or_what_they_gate(kind: int) -> None:
    gates = torch.tensor([[-3e38, -1e13, -200.0, -88.5, 0.0, 88.5, 200.0, 1e13, 3e38]])
    made = native_layers.gate(torch.cat([gates, torch.ones_like(gates)], 1), kind)
    torch.testing.assert_close(made, gates.clamp(min=0), rtol=1e-6, atol=4.0)  # -3e38 / e^88 is -2
    torch.testing.assert_close(made[:, 1:], gates[:, 1:].clamp(min=0), rtol=1e-6, atol=1e-6)


def test_another_activation_is_noticed() -> None:
    both = normal(3, 64)
    assert (native_layers.gate(both, SILU) - native_layers.gate(both, GELU_TANH)).abs().max() > 1e-2


# --- products -----------------------------------------------------------------------------------------------


@given(
    num_rows=st.integers(1, 40),
    depth=st.sampled_from([1, 5, 64, 511, 512, 513, 1100]),
    num_outputs=st.sampled_from([1, 31, 32, 33, 100]),
    is_bfloat16=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_product_is_torchs(
    num_rows: int, depth: int, num_outputs: int, is_bfloat16: bool, has_bias: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn(num_rows, depth + 3, generator=draw)[:, 1:-2],
        torch.randn(num_outputs, depth, generator=draw),
    )
    weight = weight.bfloat16().float() if is_bfloat16 else weight
    bias = torch.randn(num_outputs, generator=draw) if has_bias else None
    packed = native_matmul.pack(weight, bias)
    assert (packed.panels.dtype == torch.bfloat16) == is_bfloat16
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    bound = 1e-6 * (x.abs() @ weight.abs().T).double() + 1e-6
    assert ((native_matmul.multiply(x, packed).double() - expected).abs() <= bound).all()


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, packed = normal(300, 600), native_matmul.pack(normal(70, 600), None)
    whole = native_matmul.multiply(x, packed)
    assert torch.equal(native_matmul.multiply(x[17:18], packed), whole[17:18])
    assert torch.equal(native_matmul.multiply(x[250:263], packed), whole[250:263])
    x[3] = float("nan")
    assert torch.equal(native_matmul.multiply(x, packed)[4:], whole[4:])


def test_no_rows_make_no_outputs() -> None:
    assert native_matmul.multiply(torch.empty(0, 8), native_matmul.pack(normal(5, 8), None)).shape == (0, 5)


def test_two_numbers_of_a_weight_that_change_places_are_noticed() -> None:
    packed = native_matmul.pack(normal(64, 16).bfloat16().float(), None)
    x = normal(1, 16)
    before = native_matmul.multiply(x, packed)
    packed.panels[0, 3, [0, 1]] = packed.panels[0, 3, [1, 0]]
    assert (native_matmul.multiply(x, packed) - before).abs().max() > 1e-3


# --- structures ---------------------------------------------------------------------------------------------

TWINS = {
    "Projection": (native_layers.Projection, "disagg_projection_nbytes", "native_parts.h"),
    "Weight": (native_matmul._Weight, "disagg_weight_nbytes", "native_parts.h"),
    "Decoder": (native_decoder.Decoder, "disagg_decoder_nbytes", "native_decoder.c"),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_structure_has_the_size_and_the_order_of_fields_that_it_has_in_c(name: str) -> None:
    twin, nbytes, file = TWINS[name]
    library = native.library()
    assert library is not None
    assert ctypes.sizeof(twin) == ctypes.c_int64.in_dll(library, nbytes).value
    source = Path(native_layers.__file__).with_name(file).read_text()
    end = source.index(f"}} {name};")
    body = re.sub(r"/\*.*?\*/", "", source[source.rindex("typedef struct {", 0, end) : end])
    words = re.findall(r"\w+", body)
    names = [field[0] for field in twin._fields_]
    assert [word for word in words if word in names] == names
