"""Packed linear layers: rows are filled up to few numbers, and nothing of that shows in the result."""

from __future__ import annotations

import pytest
import torch

from disagg.engine.model.packed_linear import EXACT_ROWS, PackedLinear, can_pack, filled_up


@pytest.mark.parametrize("num_rows", [0, 1, EXACT_ROWS, EXACT_ROWS + 1, 33, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_layer_computes_what_the_plain_one_does(num_rows: int, has_bias: bool) -> None:
    if not can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    plain = torch.nn.Linear(24, 40, bias=has_bias)
    x = torch.randn(1, num_rows, 24)
    with torch.inference_mode():
        expected = plain(x)
        torch.testing.assert_close(PackedLinear(plain)(x), expected)


def test_rows_are_filled_up_to_few_numbers_for_little_work() -> None:
    counts = range(1, 8193)
    assert len({filled_up(count) for count in counts}) < 100
    assert all(count <= filled_up(count) <= 1.125 * count for count in counts)
    assert [filled_up(count) for count in range(EXACT_ROWS + 1)] == list(range(EXACT_ROWS + 1))
