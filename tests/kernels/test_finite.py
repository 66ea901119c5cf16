"""Finiteness from bits, against torch's own answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from disagg.kernels import finite
from disagg.kernels.finite import finite_rows

DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def is_finite(rows: torch.Tensor, dtype: str) -> list[bool]:
    return [bool(torch.isfinite(row.view(getattr(torch, dtype)).to(torch.float64)).all()) for row in rows]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_judged_as_torch_does(dtype: str) -> None:
    rows = np.arange(1 << 16, dtype=np.uint16)[:, None].view(np.uint8)
    assert finite_rows(rows, dtype).tolist() == is_finite(torch.from_numpy(rows), dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_8_bit_pattern_is_judged_as_torch_does(dtype: str) -> None:
    rows = np.arange(1 << 8, dtype=np.uint8)[:, None]
    assert finite_rows(rows, dtype).tolist() == is_finite(torch.from_numpy(rows), dtype)


def test_one_code_of_int8_is_not_finite() -> None:
    rows = np.arange(1 << 8, dtype=np.uint8)[:, None]
    assert [int(code) for code in np.flatnonzero(~finite_rows(rows, "int8"))] == [0x80]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_number_anywhere_makes_its_row_not_finite(dtype: str) -> None:
    kind = getattr(torch, dtype)
    rows = torch.ones(6, 33).to(kind)
    bad = [torch.nan, -torch.nan] if dtype == "float8_e4m3fn" else [torch.inf, -torch.inf, torch.nan, -torch.nan]
    for row, value in enumerate(bad):
        rows[row, row * 9] = torch.tensor(value).to(kind)
    bits = rows.view(torch.uint8).numpy()
    expected = [row >= len(bad) for row in range(6)]
    assert finite_rows(bits, dtype).tolist() == expected == is_finite(torch.from_numpy(bits), dtype)


def test_finite_values_whose_sum_overflows_are_finite() -> None:
    rows = np.full((2, 1000), np.finfo(np.float32).max, dtype=np.float32)
    rows[1] *= -1
    assert finite_rows(rows.view(np.uint8), "float32").tolist() == [True, True]


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_one_piece_is_judged_as_a_row_is(dtype: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        piece = rng.integers(0, 256, 64, dtype=np.uint8)
        piece[rng.random(64) < 0.7] &= 0x3F
        assert finite.is_finite(piece, dtype) == bool(finite_rows(piece[None], dtype)[0])
    assert finite.is_finite(np.empty(0, dtype=np.uint8), dtype)
