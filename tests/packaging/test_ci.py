"""`.ci/run` forgets the developer's machine before it checks anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAKEFILE = """\
setup check:
\t@echo $@
test:
\t@env | sort; ls -A "$$HOME" | wc -l; exit $(TEST_STATUS)
TEST_STATUS ?= 0
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A tree whose `make test` prints the environment that it got."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def run(clone: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": "/root",
        "TMPDIR": str(clone),
        **environ,
    }
    command = ["bash", str(clone / ".ci" / "run")]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=60)


def test_it_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_only_pip_settings_and_ci_are_kept(clone: Path) -> None:
    done = run(clone, PIP_FIND_LINKS="/some where", CI="true", DISAGG_PORT="1", HTTPS_PROXY="x", PYTHONPATH="/x")
    assert done.returncode == 0, done.stderr
    assert "\nPIP_FIND_LINKS=/some where\n" in done.stdout
    assert "\nCI=true\n" in done.stdout
    for name in ("DISAGG_PORT", "HTTPS_PROXY", "PYTHONPATH", "TMPDIR"):
        assert f"\n{name}=" not in done.stdout


def test_path_is_plain_and_home_is_new_empty_and_gone_afterwards(clone: Path) -> None:
    lines = run(clone).stdout.splitlines()
    (path,) = (line for line in lines if line.startswith("PATH="))
    assert path.startswith("PATH=/usr/bin:/bin:")
    assert path.count(":") == 2
    (home,) = (line.removeprefix("HOME=") for line in lines if line.startswith("HOME="))
    assert home.startswith(str(clone))
    assert not Path(home).exists()


def test_phases_are_timed_and_a_red_one_makes_the_run_red(clone: Path) -> None:
    (clone / "Makefile").write_text(MAKEFILE.replace("?= 0", "?= 3"))
    done = run(clone)
    assert done.returncode == 1
    assert re.search(r"^== make check: \d+ s, exit 0$", done.stdout, re.MULTILINE)
    assert re.search(r"^== make test: \d+ s, exit 2$", done.stdout, re.MULTILINE)
    assert "== total: " in done.stdout


def test_a_failed_install_ends_the_run(clone: Path) -> None:
    (clone / "Makefile").write_text("setup:\n\t@exit 1\n")
    done = run(clone)
    assert done.returncode != 0
    assert "make check" not in done.stdout
