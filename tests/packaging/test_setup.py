"""Setting up on a bare machine: which torch, and what is said when something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_venv() -> ModuleType:
    return load_tool("setup_venv")


def refuse() -> bool:
    raise AssertionError("asked although the answer does not matter")


def choose(setup_venv: ModuleType, **given: object) -> tuple[str | None, str]:
    """The choice on a Linux machine without driver, local wheel and network, changed by `given`."""
    facts: dict[str, object] = {
        "override": None,
        "linux": True,
        "driver": False,
        "local_wheel": lambda: None,
        "cpu_index_answers": lambda: False,
    }
    source = setup_venv.choose_torch(**{**facts, **given})
    return source.index, source.why


def test_without_a_driver_torch_comes_from_the_cpu_index(setup_venv: ModuleType) -> None:
    index, why = choose(setup_venv, cpu_index_answers=lambda: True)
    assert index == "https://download.pytorch.org/whl/cpu"
    assert "CPU build, about 200 MB" in why


def test_a_cpu_index_that_is_silent_leaves_pips_own_choice_and_says_its_size(setup_venv: ModuleType) -> None:
    index, why = choose(setup_venv)
    assert index is None
    assert "CUDA build, about 3 GB" in why
    assert "TORCH_INDEX" in why


def test_with_a_driver_the_cpu_index_is_not_asked(setup_venv: ModuleType) -> None:
    index, why = choose(setup_venv, driver=True, cpu_index_answers=refuse)
    assert index is None
    assert "CUDA build" in why


def test_a_wheel_that_pip_finds_on_this_machine_is_taken(setup_venv: ModuleType) -> None:
    index, why = choose(setup_venv, local_wheel=lambda: "torch-2.13.0.whl, 191 MB", cpu_index_answers=refuse)
    assert index is None
    assert "torch-2.13.0.whl, 191 MB" in why


def test_torch_index_overrides_everything(setup_venv: ModuleType) -> None:
    index, _ = choose(setup_venv, override="https://mirror/cu130", local_wheel=refuse, cpu_index_answers=refuse)
    assert index == "https://mirror/cu130"


def test_off_linux_torch_is_the_cpu_build_anyway(setup_venv: ModuleType) -> None:
    assert choose(setup_venv, linux=False, cpu_index_answers=refuse)[0] is None


def test_an_index_that_cannot_be_reached_is_given_up_within_seconds(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And is not taken for reachable because another source that pip knows of has the wheel."""
    wheel = tmp_path / "torch-2.13.0-py3-none-any.whl"
    wheel.touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(setup_venv, "CPU_INDEX", "http://127.0.0.1:9/whl/cpu")
    started = time.monotonic()
    assert not setup_venv.cpu_index_answers(Path(sys.executable), "torch==2.13.0")
    assert time.monotonic() - started < setup_venv.CPU_INDEX_ANSWER_S + 2


def test_an_index_that_has_the_version_answers(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "index.html").write_text('<a href="torch-2.13.0-py3-none-any.whl">torch</a>')
    monkeypatch.setattr(setup_venv, "CPU_INDEX", tmp_path.as_uri())
    assert setup_venv.cpu_index_answers(Path(sys.executable), "torch==2.13.0")
    assert not setup_venv.cpu_index_answers(Path(sys.executable), "torch==2.99.0")


def test_an_old_python_is_refused_in_one_sentence(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert setup_venv.main(["/nowhere/.venv"]) == 2
    assert re.fullmatch(r"error: \S+ is Python 3\.10, disagg needs 3\.11 or later: .*\n", capsys.readouterr().err)


def test_a_missing_venv_module_is_one_sentence(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert setup_venv.main([str(tmp_path / "venv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no venv module: `apt-get install python3." in error
    assert not (tmp_path / "venv" / ".ready").exists()


def test_a_failed_step_leaves_no_stamp(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_venv, "make_venv", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(setup_venv, "install_torch", lambda python: setup_venv.run(["false"], "installing torch"))
    assert setup_venv.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: installing torch failed")
    assert not (tmp_path / ".ready").exists()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_constraints_pin_every_direct_dependency_exactly_and_name_no_host(setup_venv: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonical(name): version for name, version in pins().items()}
    assert pinned["torch"] == "2.13.0"
    wanted = {canonical(line) for line in [*project["dependencies"], *setup_venv.dev_requirements()]}
    wanted |= {canonical(line) for line in setup_venv.dev_requirements("ucx")}
    assert wanted - pinned.keys() == set()
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^[^#]*(\+|@|/)", text, re.MULTILINE)


Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make` over a copy of the Makefile whose set-up only leaves its stamp and whose tools only say their names."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setup_venv.py").write_text(
        "import pathlib, sys\n"
        "venv = pathlib.Path(sys.argv[1]); (venv / 'bin').mkdir(parents=True, exist_ok=True)\n"
        "for name in ('pytest', 'ruff', 'mypy', 'lint-imports', 'python', 'disagg', 'pip'):\n"
        "    tool = venv / 'bin' / name; tool.write_text(f'#!/bin/sh\\necho {name} \"$@\"\\n'); tool.chmod(0o755)\n"
        "(venv / '.ready').touch(); print('set up')\n"
    )

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environ}
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_make_sets_up_once(make: Make) -> None:
    assert "set up" in make("setup").stdout
    assert "set up" not in make("setup").stdout


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "test-gpu", "check", "format", "bench", "wheel"])
def test_every_command_sets_up_by_itself(make: Make, target: str) -> None:
    done = make(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set up\n")


def test_make_check_runs_every_gate(make: Make) -> None:
    lines = make("-s", "check").stdout.splitlines()
    assert lines[1:] == ["ruff check", "ruff format --check", "mypy", "lint-imports", "python tools/check_sizes.py"]


def test_make_alone_lists_the_commands(make: Make) -> None:
    listed = make().stdout
    for target in ("demo", "test", "test-slow", "check", "bench", "help"):
        assert re.search(rf"^make {target} +\w", listed, re.MULTILINE)


def test_make_without_python_is_one_sentence(make: Make) -> None:
    done = make("test", PYTHON="python9.9")
    assert done.returncode == 2
    assert "error: `python9.9` not found: install Python 3.11 or later" in done.stderr
    assert "Traceback" not in done.stderr
