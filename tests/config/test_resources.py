from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.cache.host_memory import available_nbytes
from disagg.config.quantities import endpoint_host, format_nbytes, is_loopback, parse_nbytes
from disagg.config.resources import CPU_MEMORY_FRACTION, default_kv_cache_nbytes, num_cores, threads_by_role


def test_cores_are_limited_by_a_quota(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert num_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert num_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_a_quota_of_the_group_around_holds_too(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "pod").mkdir()
    (tmp_path / "pod" / "cpu.max").write_text("6400000 100000\n")
    assert num_cores(tmp_path / "pod") == 1


def test_a_quota_of_cgroup_v1_is_seen(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    assert num_cores(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert num_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_this_machine_has_cores_and_memory() -> None:
    assert num_cores() >= 1
    assert 0 < default_kv_cache_nbytes(0.5) < CPU_MEMORY_FRACTION * available_nbytes()


@pytest.mark.parametrize(
    ("prefill", "decode", "both", "cores", "threads"),
    [
        (1, 1, 0, 8, (4, 4)),
        (1, 1, 0, 2, (1, 1)),
        (1, 1, 0, 3, (2, 1)),
        (2, 1, 0, 8, (3, 2)),
        (1, 2, 0, 8, (4, 2)),
        (2, 2, 0, 2, (1, 1)),
        (1, 0, 0, 1, (1, 1)),
        (0, 0, 2, 5, (2, 2)),
    ],
)
def test_workers_share_the_cores_and_prefill_takes_what_is_left(
    prefill: int, decode: int, both: int, cores: int, threads: tuple[int, int]
) -> None:
    found = threads_by_role({"prefill": prefill, "decode": decode, "both": both}, cores)
    assert (found["prefill"], found["decode"]) == threads
    assert found["both"] == found["decode"]
    used = prefill * found["prefill"] + decode * found["decode"] + both * found["both"]
    assert used <= max(cores, prefill + decode + both)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("512MiB", 512 << 20), ("2 gib", 2 << 30), ("1.5KiB", 1536), ("1kb", 1000), ("7B", 7)],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 2", "1XB", "0x10"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected bytes such as"):
        parse_nbytes(text)


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5 TiB")])
def test_sizes_are_shown_with_three_digits(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (999, "999 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (int(999.6 * 1024), "1000 KiB"),
        (1010 << 20, "1010 MiB"),
        ((1 << 30) - 1, "1 GiB"),
        (1023 << 30, "1023 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_at_the_edge_of_a_unit_keep_plain_digits(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@given(st.integers(0, 1 << 60))
def test_every_size_is_shown_within_half_a_percent_and_without_powers_of_ten(nbytes: int) -> None:
    text = format_nbytes(nbytes)
    assert re.fullmatch(r"\d+(\.\d+)? ([KMGT]i)?B", text)
    shown = parse_nbytes(text)
    assert isinstance(shown, int)
    assert abs(shown - nbytes) <= 0.005 * nbytes + 1


def test_loopback_is_known_without_a_resolver() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.8.7", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "127.0.0.1.example.com", "::", "")))


def test_the_host_of_an_endpoint() -> None:
    assert endpoint_host("tcp://node7:80") == "node7"
    assert endpoint_host("tcp://[::1]:80") == "::1"
