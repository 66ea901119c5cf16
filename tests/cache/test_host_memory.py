from __future__ import annotations

from pathlib import Path

import pytest

from disagg.cache.host_memory import available_nbytes, total_nbytes

MACHINE = 100 << 10


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 200 kB\nMemAvailable:     100 kB\n")
    return path


def group(folder: Path, **files: object) -> Path:
    """A control group whose `memory.<name>` hold these texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")
    return folder


def test_memory_is_limited_by_a_cgroup(tmp_path: Path, meminfo: Path) -> None:
    assert available_nbytes(tmp_path, meminfo) == MACHINE
    assert available_nbytes(group(tmp_path, max=5000, current=1000), meminfo) == 4000
    assert available_nbytes(group(tmp_path, current=6000), meminfo) == 0
    assert available_nbytes(group(tmp_path, max="max"), meminfo) == MACHINE


def test_page_cache_counts_as_free(tmp_path: Path, meminfo: Path) -> None:
    statistics = "anon 300\nfile 6500\nkernel 50\ninactive_file 6000\nactive_file 500\nshmem 7\nslab_reclaimable 0"
    assert available_nbytes(group(tmp_path, max=8000, current=7900, stat=statistics), meminfo) == 6600


def test_more_page_cache_than_use_is_no_more_than_the_limit(tmp_path: Path, meminfo: Path) -> None:
    """The counters of a busy group are read one after the other, so they may disagree."""
    assert available_nbytes(group(tmp_path, max=8000, current=100, stat="inactive_file 900"), meminfo) == 8000


def test_a_limit_around_the_group_holds_too(tmp_path: Path, meminfo: Path) -> None:
    group(tmp_path, max=3000, current=1000)
    inner = group(tmp_path / "pods" / "one", max=9000, current=500)
    assert available_nbytes(inner, meminfo) == 2000
    assert available_nbytes(tmp_path / "pods" / "without files", meminfo) == 2000


def test_a_limit_that_slows_down_is_a_limit(tmp_path: Path, meminfo: Path) -> None:
    assert available_nbytes(group(tmp_path, max=9000, high=5000, current=1000), meminfo) == 4000
    assert available_nbytes(group(tmp_path, max="max", high="max"), meminfo) == MACHINE


@pytest.mark.parametrize("mount", ["", "memory"])
def test_cgroup_v1_is_seen(mount: str, tmp_path: Path, meminfo: Path) -> None:
    statistics = "cache 3000\ninactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 500\n"
    folder = group(tmp_path / mount, limit_in_bytes=8000, usage_in_bytes=7000, stat=statistics)
    assert available_nbytes(tmp_path, meminfo) == 8000 - (7000 - 2500)
    group(folder, stat=f"{statistics}hierarchical_memory_limit 6000")
    assert available_nbytes(tmp_path, meminfo) == 6000 - (7000 - 2500)
    group(folder, stat="", limit_in_bytes=9223372036854771712)
    assert available_nbytes(tmp_path, meminfo) == MACHINE


@pytest.mark.parametrize("text", ["", "nonsense", "-1"])
def test_files_that_say_nothing_limit_nothing(text: str, tmp_path: Path, meminfo: Path) -> None:
    assert available_nbytes(group(tmp_path, max=text, current=text, stat=text), meminfo) == MACHINE
    assert available_nbytes(group(tmp_path, max=5000), meminfo) == 5000


def test_this_process_s_own_groups_are_read_without_a_folder() -> None:
    assert available_nbytes() > 0


def test_a_kernel_that_does_not_say_what_is_available_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 200 kB\n")
    with pytest.raises(OSError, match=r"no `MemAvailable`; Linux 3\.14 or newer"):
        available_nbytes(tmp_path, tmp_path / "meminfo")


def test_total_memory_is_the_limit_whatever_is_used(tmp_path: Path, meminfo: Path) -> None:
    assert total_nbytes(tmp_path, meminfo) == 2 * MACHINE
    assert total_nbytes(group(tmp_path, max=5000, current=4900), meminfo) == 5000
