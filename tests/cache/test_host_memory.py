from __future__ import annotations

from pathlib import Path

import pytest

from disagg.cache.host_memory import available_nbytes


def test_memory_is_limited_by_a_cgroup(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 200 kB\nMemAvailable:     100 kB\n")
    assert available_nbytes(tmp_path, meminfo) == 102400
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_nbytes(tmp_path, meminfo) == 4000
    (tmp_path / "memory.current").write_text("6000\n")
    assert available_nbytes(tmp_path, meminfo) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_nbytes(tmp_path, meminfo) == 102400


def test_a_kernel_that_does_not_say_what_is_available_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 200 kB\n")
    with pytest.raises(OSError, match=r"no `MemAvailable`; Linux 3\.14 or newer"):
        available_nbytes(tmp_path, tmp_path / "meminfo")
