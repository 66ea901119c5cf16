"""`make test` runs two kinds of tests at once and once more alone what failed: it hides no failure of either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tools import ROOT

PYTEST = """#!/bin/sh
for option in "$@"; do case "$option" in --failures-to=*) file=${option#*=};; esac; done
case "$1 $2" in
*"not processes"*) run=beside; sleep 0.5;;
"-m "*) run=alone;;
*) run=again;;
esac
echo "$run, nice $(nice), $*"
cat FOLDER/$run 2>/dev/null >>$file
exit $(cat FOLDER/$run.code)
"""

Failures = Sequence[tuple[str, bool]]
"""Of a run: tests, and whether load may be the reason."""


def run(
    folder: Path,
    *,
    alone: int | Failures = 0,
    beside: int | Failures = 0,
    again: Failures = (),
) -> subprocess.CompletedProcess[str]:
    """`tools/run_tests.py` of an environment whose pytest only says how it was started, and ends as it is told."""
    python = folder / "python"
    python.symlink_to(sys.executable)
    (folder / "pytest").write_text(PYTEST.replace("FOLDER", str(folder)))
    (folder / "pytest").chmod(0o755)
    for name, outcome in {"alone": alone, "beside": beside, "again": again}.items():
        code = outcome if isinstance(outcome, int) else int(bool(outcome))
        (folder / f"{name}.code").write_text(str(code))
        if not isinstance(outcome, int):
            (folder / name).write_text("".join(json.dumps(failure) + "\n" for failure in outcome))
    argv = [str(python), str(ROOT / "tools" / "run_tests.py"), "tests/cache"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def runs_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """How pytest was started, each time."""
    return [line for line in done.stdout.splitlines() if ", nice " in line]


def late(*names: str) -> Failures:
    return [(name, True) for name in names]


def test_each_test_is_in_one_of_the_two_runs_and_both_reports_are_shown(tmp_path: Path) -> None:
    done = run(tmp_path)
    first, second = runs_of(done)
    assert done.returncode == 0, done.stderr
    assert first.startswith("alone, nice ")
    assert "-m not slow and not gpu and processes " in first
    assert second.startswith("beside, nice ")
    assert "-m not slow and not gpu and not processes " in second
    assert first.endswith("tests/cache")
    assert second.endswith("tests/cache")


def test_the_run_beside_leaves_the_cores_to_the_other(tmp_path: Path) -> None:
    alone, beside = (int(line.split()[2].rstrip(",")) for line in runs_of(run(tmp_path)))
    assert beside > alone or alone == 19


@pytest.mark.parametrize(
    ("alone", "beside", "code"), [(3, 0, 3), (0, 2, 2), (4, 2, 4), (5, 0, 0), (0, 5, 0), (5, 5, 5)]
)
def test_an_error_of_either_run_fails_both_and_one_of_them_may_be_empty(
    tmp_path: Path, alone: int, beside: int, code: int
) -> None:
    done = run(tmp_path, alone=alone, beside=beside)
    assert done.returncode == code
    assert len(runs_of(done)) == 2


def test_a_failure_that_was_not_told_fails_both(tmp_path: Path) -> None:
    done = run(tmp_path, beside=1)
    assert done.returncode == 1
    assert len(runs_of(done)) == 2


def test_what_failed_in_either_run_is_tried_once_more_alone_and_named(tmp_path: Path) -> None:
    done = run(tmp_path, alone=late("tests/a.py::test_a[x y]"), beside=late("tests/b.py::test_b", "tests/a.py::test_c"))
    *_, again = runs_of(done)
    assert done.returncode == 0
    assert "-n 0 " in again
    assert again.endswith("tests/a.py::test_a[x y] tests/b.py::test_b tests/a.py::test_c")
    *_, title, a, b, c = done.stdout.splitlines()
    assert title.startswith("== FAILED BESIDE THE OTHERS, PASSED ALONE")
    assert [a.strip(), b.strip(), c.strip()] == ["tests/a.py::test_a[x y]", "tests/a.py::test_c", "tests/b.py::test_b"]


def test_what_fails_alone_too_stays_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, beside=late("test_a", "test_b"), again=late("test_b"))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-4:] == [
        "== FAILED ALONE TOO:",
        "  test_b",
        "== FAILED BESIDE THE OTHERS, PASSED ALONE, so they depend on the machine's load:",
        "  test_a",
    ]


def test_what_was_wrong_is_not_tried_again(tmp_path: Path) -> None:
    done = run(tmp_path, alone=late("test_a"), beside=[("test_b", False), ("test_b", True)])
    assert done.returncode == 1
    assert len(runs_of(done)) == 2
    assert "no load explains the failure of test_b" in done.stdout


def test_many_failures_are_no_matter_of_load(tmp_path: Path) -> None:
    done = run(tmp_path, beside=late(*(f"test_{number}" for number in range(13))))
    assert done.returncode == 1
    assert len(runs_of(done)) == 2


# --- what the tests' own conftest tells -----------------------------------------------------------------------

ENDINGS = """
import os
from pathlib import Path

import pytest
from support.faults.wrong import Wrong


def test_good(): ...


def test_late():
    assert not "in time"


@pytest.mark.processes
def test_late_once():
    if not Path("once").exists():
        Path("once").touch()
        raise AssertionError("late")


def test_wrong():
    raise Wrong("tokens")


def test_wrong_in_a_group():
    raise ExceptionGroup("calls", [TimeoutError(), Wrong("tokens")])


@pytest.fixture
def setting_up():
    raise TimeoutError("not linked")


def test_late_before_it_began(setting_up): ...


def test_crash():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.abort()
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_each_failure_is_told_with_whether_load_may_be_the_reason(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_endings.py").write_text(ENDINGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  processes: in real time\n")
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-n", workers, "--failures-to=failures"]
    unset = {"PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": str(ROOT / "tests")}
    argv = [sys.executable, "-P", "-m", "pytest", *options, "test_endings.py"]
    ran = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    told = dict(map(json.loads, (tmp_path / "failures").read_text().splitlines()))
    expected = {"late": True, "wrong": False, "wrong_in_a_group": False, "late_before_it_began": True}
    expected |= {"crash": False} if workers == "1" else {}
    assert told == {f"test_endings.py::test_{name}": may_be_late for name, may_be_late in expected.items()}
