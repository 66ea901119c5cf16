"""A newcomer follows the pages word for word: two machines (here two loopback addresses), and every command that is
named outside the README's blocks, whose own test is `test_readme.py`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Workers on two machines")[1].split("\n## ")[0]
DRAW_SECRET, START = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
MACHINES = {"10.0.0.1": "127.0.0.1", "10.0.0.2": "127.0.0.2"}
READY_S = 60  # three processes import torch and load the model on cores that other tests use too

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "BENCHMARKS.md",
    ROOT / "disagg" / "demo_model" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = r"(?:python3?|pip|pytest|disagg)"
BLOCK = re.compile(r"```bash\n[^`]*```|^ {4}\S.*$", re.MULTILINE)
NOT_TO_BE_RUN = "python -m pytest"  # CONTRIBUTING.md says why not


def here(text: str, ports: dict[str, str]) -> str:
    """The page's text with this machine's addresses and free ports in place of the page's."""
    for there, at in {**MACHINES, **ports}.items():
        text = re.sub(rf"\b{re.escape(there)}\b", at, text)
    return text


def free_ports(count: int) -> list[str]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A clone's root, as far as the section uses it, and a `disagg` where set-up puts it."""
    shutil.copytree(ROOT / "deploy" / "two-machines", tmp_path / "deploy" / "two-machines")
    program = tmp_path / ".venv" / "bin" / "disagg"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m disagg "$@"\n')
    program.chmod(0o755)
    return tmp_path


@contextmanager
def started(line: str, folder: Path) -> Iterator[None]:
    """The line, as typed into a terminal of its own; Ctrl-C at the end."""
    log = (folder / f"{line.split()[1]}.log").open("w")
    with (
        log,
        subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=folder, env=environment(), stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield
            assert process.poll() is None, (folder / log.name).read_text()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(40)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DISAGG_")}


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which the section calls")
def test_the_section_for_two_machines_serves_as_written(machine: Path) -> None:
    ports = dict(zip(("8000", "8001", "8998"), free_ports(3), strict=True))
    for path in (machine / "deploy" / "two-machines").iterdir():
        path.write_text(here(path.read_text(), ports))
    subprocess.run(["bash", "-euc", DRAW_SECRET], cwd=machine, check=True)
    *servers, ask = here(START.replace("\\\n", " "), ports).splitlines()
    assert [line.split()[1] for line in servers] == ["router", "prefill", "decode"]
    with ExitStack() as terminals:
        for line in servers:
            terminals.enter_context(started(line, machine))
        answer = answer_of(ask)
        linked = subprocess.run(["curl", "-s", f"http://127.0.0.1:{ports['8000']}/workers"], capture_output=True)
    assert '"text"' in answer, [path.read_text() for path in machine.glob("*.log")]
    assert b'"zmq"' in linked.stdout, "KV between machines is encrypted"


def answer_of(ask: str) -> str:
    """What the last line prints once the workers are there: until then it says 503 or nothing."""
    deadline = time.monotonic() + READY_S
    while True:
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
        if '"text"' in done.stdout or time.monotonic() > deadline:
            return done.stdout + done.stderr
        time.sleep(0.5)


def bare_commands(text: str) -> list[str]:
    """Lines and inline code to paste that begin with a program which is on no newcomer's path."""
    lines = re.findall(rf"^(?: {{4}})?({PROGRAMS} .*)$", "\n".join(BLOCK.findall(text)), re.MULTILINE)
    spans = re.findall(r"`((?:python3?|pip) [^`]*)`", text)
    return [command for command in lines + spans if command != NOT_TO_BE_RUN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_to_run_names_the_program_of_the_environment(page: Path) -> None:
    assert bare_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "\n    python benchmarks/engine.py --full\n",
        "```bash\ndisagg up\n```\n",
        "it is `pip install 'disagg[triton]'`.",
    ],
)
def test_the_check_of_commands_sees_a_program_that_is_on_no_path(text: str) -> None:
    assert len(bare_commands(text)) == 1


def test_scripts_and_make_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`[^`\n]*?((?:benchmarks|examples|tools|deploy|tests|docs)/[\w/.-]*\w\.\w+)", text):
            assert (ROOT / path).exists() or path == "deploy/secrets/cluster.secret", (page.name, path)
        for target in re.findall(r"`make ([\w-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)


def test_extras_that_the_pages_install_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"'\.\[([\w,-]+)\]'", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras.keys(), page.name


def test_one_file_holds_the_secret_wherever_a_page_names_it() -> None:
    folder = ROOT / "deploy"
    (drawn,) = set(re.findall(r"> (\S+\.secret)", DRAW_SECRET))
    named = {
        path
        for name in ("two-machines/router.yaml", "two-machines/prefill.yaml", "two-machines/decode.yaml")
        for path in re.findall(r"^secret_file: (\S+)", (folder / name).read_text(), re.MULTILINE)
    }
    assert named == {drawn}
    assert f"file: ./{drawn.removeprefix('deploy/')}" in (folder / "compose.yaml").read_text()
    assert set(re.findall(r"> (\S+\.secret)", (folder / "compose.yaml").read_text())) == {drawn}
