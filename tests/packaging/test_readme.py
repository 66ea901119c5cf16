"""The README tells the truth: its shell blocks run, its functions exist, its links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDS = re.compile(r"<!-- needs (.+?) -->\n```bash\n(.*?)```", re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", NEEDS.sub("", README), re.DOTALL)
# What this suite itself is, and what its own tests run: starting them from here would run them twice.
COVERED_ELSEWHERE = {"make test\n", "make demo\n"}
SERVES_UNTIL_STOPPED = ".venv/bin/disagg up\n"


def test_the_readme_names_only_functions_that_exist() -> None:
    names = set(re.findall(r"`(disagg(?:\.\w+)+)`", README))
    assert len(names) >= 12
    for name in sorted(names):
        assert _resolves(name), name


def test_the_check_of_names_fails_for_a_name_that_is_gone() -> None:
    assert not _resolves("disagg.engine.engine.Engine.stepp")
    assert not _resolves("disagg.engines.engine")


def test_the_readme_links_to_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("block", sorted(set(BLOCKS) - COVERED_ELSEWHERE - {SERVES_UNTIL_STOPPED}))
def test_each_shell_block_of_the_readme_runs(block: str, tmp_path: Path) -> None:
    script = block.replace("deploy/secrets", str(tmp_path / "secrets")).replace(".venv/bin/disagg", _disagg())
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which the printed line calls")
def test_up_as_the_readme_starts_it_serves_until_it_is_stopped() -> None:
    assert SERVES_UNTIL_STOPPED in BLOCKS
    argv = [*_disagg().split(), "up"]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_any_port()
    ) as process:
        assert process.stdout is not None
        curl = next(line for line in process.stdout if line.startswith("curl "))
        answer = subprocess.run(["bash", "-c", curl + " -sf"], capture_output=True, text=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
    assert '"text"' in answer.stdout, answer.stderr


def test_blocks_that_are_not_run_say_what_they_need() -> None:
    assert [need for need, _ in NEEDS.findall(README)] == ["two machines"]


def _disagg() -> str:
    return f"{sys.executable} -P -m disagg"


def _any_port() -> dict[str, str]:
    """Port 8000 may be taken on a developer's machine."""
    return os.environ | {"DISAGG_PORT": "0"}


def _resolves(name: str) -> bool:
    """Whether `name` is a module, or an attribute path inside one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False
