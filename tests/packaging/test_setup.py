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
    monkeypatch.setattr(setup_venv, "CPU_INDEX_ANSWER_S", 60)  # pip takes seconds to start on a busy machine
    assert setup_venv.cpu_index_answers(Path(sys.executable), "torch==2.13.0")
    assert not setup_venv.cpu_index_answers(Path(sys.executable), "torch==2.99.0")


def test_an_old_python_is_refused_in_one_sentence(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert setup_venv.main(["serve", "/nowhere/.venv"]) == 2
    assert re.fullmatch(r"error: \S+ is Python 3\.10, disagg needs 3\.11 or later: .*\n", capsys.readouterr().err)


def test_a_missing_venv_module_is_one_sentence(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert setup_venv.main(["serve", str(tmp_path / "venv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no venv module: `apt-get install python3." in error
    assert not (tmp_path / "venv" / ".ready-serve").exists()


def test_a_failed_step_leaves_no_stamp(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_venv, "install_serve", lambda folder: setup_venv.run(["false"], "installing torch"))
    assert setup_venv.main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: installing torch failed")
    assert list(tmp_path.iterdir()) == []


def test_what_pip_says_is_shown_only_when_it_fails(setup_venv: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    setup_venv.run(["sh", "-c", "echo collecting; echo warning >&2"], "installing")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(setup_venv.SetupError, match="installing failed, see above"):
        setup_venv.run(["sh", "-c", "echo collecting; echo no such wheel >&2; exit 1"], "installing")
    assert capfd.readouterr().err == "collecting\nno such wheel\n"


@pytest.fixture
def commands(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a set-up would run, in a folder whose torch is there already."""
    ran: list[list[str]] = []
    monkeypatch.setattr(setup_venv, "run", lambda command, what: ran.append(command))
    monkeypatch.setattr(setup_venv, "is_installed", lambda python, requirement: True)
    return ran


def test_serving_needs_no_developers_tool(
    setup_venv: ModuleType, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_venv.main(["serve", str(tmp_path)]) == 0
    asked = {word for command in commands for word in command}
    assert asked.isdisjoint([*setup_venv.dev_requirements(), *setup_venv.dev_requirements("ucx")])
    assert [path.name for path in tmp_path.iterdir()] == [".ready-serve"]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_developer_gets_every_tool_and_ucx_without_what_it_asks_for(
    setup_venv: ModuleType, commands: list[list[str]], tmp_path: Path
) -> None:
    assert setup_venv.main(["dev", str(tmp_path)]) == 0
    tools, ucx = commands
    assert set(setup_venv.dev_requirements()) <= set(tools)
    assert set(setup_venv.dev_requirements("ucx")) | {"--no-deps"} <= set(ucx)
    assert (tmp_path / ".ready").exists()


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
        "stage, venv = sys.argv[1], pathlib.Path(sys.argv[2]); (venv / 'bin').mkdir(parents=True, exist_ok=True)\n"
        "for name in ('pytest', 'ruff', 'mypy', 'lint-imports', 'python', 'disagg', 'pip'):\n"
        "    tool = venv / 'bin' / name; tool.write_text(f'#!/bin/sh\\necho {name} \"$@\"\\n'); tool.chmod(0o755)\n"
        "(venv / {'serve': '.ready-serve', 'dev': '.ready'}[stage]).touch(); print('set up', stage)\n"
    )

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environ}
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_make_sets_up_once(make: Make) -> None:
    assert "set up" in make("setup").stdout
    assert "set up" not in make("setup").stdout


def test_a_change_of_the_pins_sets_up_again(make: Make, tmp_path: Path) -> None:
    make("setup")
    later = time.time() + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "set up serve\nset up dev" in make("setup").stdout


@pytest.mark.parametrize("target", ["demo", "wheel"])
def test_a_users_command_sets_up_what_serving_needs(make: Make, target: str) -> None:
    done = make(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set up serve\n")
    assert "set up dev" not in done.stdout


@pytest.mark.parametrize("target", ["test", "test-slow", "test-gpu", "check", "format", "bench"])
def test_a_developers_command_adds_the_tools(make: Make, target: str) -> None:
    make("demo")
    done = make(target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set up dev\n")


def test_make_check_runs_every_gate(make: Make) -> None:
    lines = make("-s", "check").stdout.splitlines()
    assert lines[2:] == [
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "python tools/check_sizes.py",
        "python tools/check_dependencies.py",
        "python tools/check_house.py",
        "python tools/check_router.py",
    ]


def test_make_alone_lists_the_commands(make: Make) -> None:
    listed = make().stdout
    for target in ("demo", "test", "test-slow", "check", "bench", "help"):
        assert re.search(rf"^make {target} +\w", listed, re.MULTILINE)


def test_make_without_python_is_one_sentence(make: Make) -> None:
    done = make("test", PYTHON="python9.9")
    assert done.returncode == 2
    assert "error: `python9.9` not found: install Python 3.11 or later" in done.stderr
    assert "Traceback" not in done.stderr
