"""Philox4x32-10 against the known-answer vectors that its authors publish with Random123 (kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest

from disagg.engine import philox
from disagg.engine.philox import as_int64, philox4x32

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def uniforms(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    return philox.uniforms(np.full(len(ids), as_int64(seed)), np.full(len(ids), position), ids)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    arrays = [np.array([word], np.uint32) for word in (*counter, *key)]
    words = philox4x32((arrays[0], arrays[1], arrays[2], arrays[3]), (arrays[4], arrays[5]))
    assert tuple(int(word[0]) for word in words) == expected


def test_an_ids_number_does_not_depend_on_which_ids_are_asked_for() -> None:
    every = uniforms(5, 77, np.arange(1000))
    some = np.array([999, 3, 4, 500])
    assert (uniforms(5, 77, some) == every[some]).all()


def test_seed_and_position_count_in_all_their_bits() -> None:
    ids = np.arange(8)
    numbers = {tuple(uniforms(seed, position, ids)) for seed in (0, 1, 1 << 32, -1) for position in (0, 1, 1 << 40)}
    assert len(numbers) == 12


def test_numbers_are_uniform_and_noise_is_finite() -> None:
    numbers = uniforms(1, 2, np.arange(200_000))
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert np.abs(counts - 10_000).max() < 500  # five standard deviations of a bin
    ids = np.arange(200_000)
    assert np.isfinite(philox.gumbel(np.full(200_000, 1), np.full(200_000, 2), ids)).all()
