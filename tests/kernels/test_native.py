"""The compiled helper against xxhash, numpy and `finite_rows`; and that nothing needs it."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from disagg.kernels import native
from disagg.kernels.finite import LARGEST_FINITE, finite_rows

needs_helper = pytest.mark.skipif(
    not native.is_loaded(), reason="the compiled helper is not built: no C compiler when the package was installed"
)
SIZES = (248, 256, 1016, 1024, 1032, 1088, 2048, 32 << 10, (32 << 10) + 8, (64 << 10) + 1000, 425_984)


def at(memory: np.ndarray, *offsets: int) -> np.ndarray:
    return np.array([memory.ctypes.data + offset for offset in offsets], dtype=np.uint64)


@needs_helper
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("offset", [0, 8, 56])
def test_what_was_landed_is_the_source_and_its_digest_is_xxh3(nbytes: int, offset: int) -> None:
    rng = np.random.default_rng(nbytes)
    source, to = (np.frombuffer(rng.bytes(2 * nbytes + 64), dtype=np.uint8).copy() for _ in range(2))
    before = to.copy()
    digests, _ = native.land(at(to, offset + nbytes, offset), at(source, 0, nbytes), nbytes, "float32")
    expected = source[:nbytes], source[nbytes : 2 * nbytes]
    assert digests.tolist() == [xxhash.xxh3_64_intdigest(part.tobytes()) for part in expected]
    before[offset : offset + 2 * nbytes] = np.concatenate(expected[::-1])
    assert np.array_equal(to, before)  # nothing else was written
    again, _ = native.land(at(to, offset + nbytes, offset), None, nbytes, "float32")
    assert again.tolist() == digests.tolist()


@needs_helper
def test_a_digest_without_a_source_is_of_the_bytes_that_lie_there() -> None:
    memory = np.zeros(1024, dtype=np.uint8)
    clean, _ = native.land(at(memory, 0), None, 1024, "float32")
    for byte in (0, 511, 1023):
        memory[byte] ^= 1
        assert native.land(at(memory, 0), None, 1024, "float32")[0] != clean
        memory[byte] ^= 1


@needs_helper
@pytest.mark.parametrize("dtype", [*LARGEST_FINITE, "int8"])
def test_a_unit_is_finite_exactly_when_its_row_is(dtype: str) -> None:
    rng = np.random.default_rng(3)
    rows = np.frombuffer(rng.bytes(64 * 2056), dtype=np.uint8).reshape(64, 2056) & 0x3F
    for row in range(0, 64, 2):  # any bits at all, in places that the blocks, the stripes and the last stripe cover
        rows[row, (row * 37) % 2048 : (row * 37) % 2048 + 8] = np.frombuffer(rng.bytes(8), dtype=np.uint8)
    rows[::4, -8:] = 0x80 if dtype == "int8" else 0xFF
    _, finite = native.land(at(rows, *range(0, rows.size, 2056)), None, 2056, dtype)
    assert finite.tolist() == finite_rows(rows, dtype).tolist()
    assert 0 < finite.sum() < 64


@needs_helper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_judged_alike_wherever_it_stands(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    rows = np.zeros((1 << 16, 256), dtype=np.uint16)
    rows[np.arange(1 << 16), patterns % 256] = patterns
    _, finite = native.land(at(rows, *range(0, rows.nbytes, 512)), None, 512, dtype)
    assert finite.tolist() == finite_rows(patterns[:, None].view(np.uint8), dtype).tolist()


@needs_helper
@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 63, 4095, 4096, 4097, 70_001])
@pytest.mark.parametrize("offset", [0, 1, 13])
def test_a_streamed_copy_writes_its_bytes_and_no_other(nbytes: int, offset: int) -> None:
    source = np.frombuffer(np.random.default_rng(1).bytes(nbytes + 64), dtype=np.uint8)
    to = np.full(nbytes + 64, 7, dtype=np.uint8)
    native.copy(at(to, offset), at(source, 3), np.array([nbytes], dtype=np.uint64))
    expected = np.full(nbytes + 64, 7, dtype=np.uint8)
    expected[offset : offset + nbytes] = source[3 : 3 + nbytes]
    assert np.array_equal(to, expected)


@needs_helper
def test_units_that_xxh3_hashes_by_another_formula_are_refused() -> None:
    assert not native.can_land(240)
    assert not native.can_land(1001)
    assert native.can_land(1000)


def test_a_library_of_another_version_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.is_loaded():
        pytest.skip("the compiled helper is not built: no C compiler when the package was installed")
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native._find() is None
    assert "build the package anew" in caplog.text
