"""Which control groups a process is in, as Linux writes it for v2, v1 and both at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg.cache.cgroup import groups_of_process, read_count

ROOT = Path("/cg")


@pytest.mark.parametrize(
    ("lines", "folders"),
    [
        ("0::/\n", ["/cg"]),
        ("0::/pods/one\n", ["/cg/pods/one", "/cg/pods", "/cg"]),
        ("0::/../../other\n", ["/cg"]),
        ("", ["/cg"]),
        ("5:memory:/docker/x\n1:cpu,cpuacct:/y\n", ["/cg/memory/docker/x", "/cg/memory/docker", "/cg/memory"]),
        ("4:memory:/v1\n0::/v2\n", ["/cg/memory/v1", "/cg/memory", "/cg/v2", "/cg"]),
    ],
)
def test_a_group_and_all_around_it_are_found(lines: str, folders: list[str], tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(lines)
    assert [str(folder) for folder in groups_of_process("memory", ROOT, membership)] == folders


def test_controllers_that_v1_mounts_together_are_found_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("1:cpu,cpuacct:/y\n")
    found = groups_of_process("cpu", ROOT, tmp_path / "cgroup")
    assert [str(folder) for folder in found] == ["/cg/cpu,cpuacct/y", "/cg/cpu,cpuacct", "/cg/cpu/y", "/cg/cpu"]


def test_a_kernel_without_the_file_limits_nothing_by_it(tmp_path: Path) -> None:
    assert groups_of_process("memory", ROOT, tmp_path / "none") == [ROOT]


@pytest.mark.parametrize(("text", "count"), [("12\n", 12), ("max\n", None), ("-1\n", None), ("", None), ("²", None)])
def test_a_limit_is_a_number_or_none(text: str, count: int | None, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(text)
    assert read_count(tmp_path / "memory.max") == count
