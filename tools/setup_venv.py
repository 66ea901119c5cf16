"""Make a virtual environment with disagg (editable) and what it serves with, or add what its developers need.

    python3 tools/setup_venv.py serve .venv
    python3 tools/setup_venv.py dev .venv

Run by `make`, `serve` before `dev`; the files `.ready-serve` and `.ready` inside the environment say what is complete.
Nothing is ever removed: an environment that exists is brought up to date. One line is printed per group of packages;
what pip says is shown when it fails. The standard library is all that may be used here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_ANSWER_S = 8  # one small page at a 3 s connect timeout, and the time that pip needs to start
CPU_BUILD = "CPU build, about 200 MB"
CUDA_BUILD = "on Linux this is the CUDA build, about 3 GB with its libraries"
MARKERS = {"serve": ".ready-serve", "dev": ".ready"}
TICK_S = 1  # between two looks at a step that is running: as often as a person wants to see that it is
SHOWN_LINES = 30  # of pip's, when it fails: its error and what led there


class SetupError(Exception):
    """Something that the user can mend, in one sentence."""


@dataclass(frozen=True)
class TorchSource:
    """Where torch comes from: `index` is None when pip's own configuration decides."""

    index: str | None
    why: str


def choose_torch(
    *,
    override: str | None,
    linux: bool,
    driver: bool,
    local_wheel: Callable[[], str | None],
    cpu_index_answers: Callable[[], bool],
) -> TorchSource:
    """The build of torch that fits this machine.

    On Linux, PyPI's torch is the CUDA build: without an NVIDIA driver its gigabytes would only lie there.
    `local_wheel` and `cpu_index_answers` are called at most once, and only when their answer matters.
    """
    if override:
        return TorchSource(override, "from TORCH_INDEX")
    if wheel := local_wheel():
        return TorchSource(None, f"{wheel}, which pip is configured to find on this machine")
    if not linux:
        return TorchSource(None, CPU_BUILD)
    if driver:
        return TorchSource(None, f"this machine has an NVIDIA driver; {CUDA_BUILD}")
    if cpu_index_answers():
        return TorchSource(CPU_INDEX, f"no NVIDIA driver; {CPU_BUILD}, from PyTorch's CPU index")
    return TorchSource(None, f"PyTorch's CPU index does not answer; {CUDA_BUILD}. TORCH_INDEX=URL names another index")


def has_nvidia_driver() -> bool:
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def pip(python: Path, *arguments: str) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]


def find_local_wheel(python: Path, requirement: str) -> str | None:
    """Name and size of the wheel of `requirement` in the folders pip is told to look in, without any network."""
    report = python.parent.parent / "torch.json"
    command = pip(python, "install", "--quiet", "--dry-run", "--no-index", "--no-deps", "--ignore-installed")
    found = subprocess.run([*command, "--report", str(report), requirement], capture_output=True)
    if found.returncode != 0:
        return None
    url = json.loads(report.read_text())["install"][0]["download_info"]["url"]
    report.unlink()
    path = Path(unquote(urlparse(url).path))
    size = f", {path.stat().st_size / 1e6:.0f} MB" if path.is_file() else ""
    return f"{path.name}{size}"


def cpu_index_answers(python: Path, requirement: str) -> bool:
    """Ask through pip, because pip knows this machine's proxies and certificates; of no other source than the index."""
    only_it = {**os.environ, "PIP_EXTRA_INDEX_URL": CPU_INDEX, "PIP_FIND_LINKS": os.devnull}
    name, version = requirement.split("==")
    command = pip(python, "index", "versions", name, "--index-url", CPU_INDEX, "--timeout", "3", "--retries", "0")
    try:
        answer = subprocess.run(command, env=only_it, capture_output=True, text=True, timeout=CPU_INDEX_ANSWER_S)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and version in answer.stdout


def torch_requirement() -> str:
    """`torch==...` of the constraints file."""
    found = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SetupError("constraints.txt pins no torch: restore the line `torch==...`")
    return found.group()


def dev_requirements(group: str = "dev") -> list[str]:
    """A dependency group; read here, because `pip install --group` needs a newer pip than venvs come with."""
    import tomllib  # new in 3.11: imported once the version is known to be right

    groups: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return groups[group]


def run(command: list[str], what: str) -> None:
    """Run to its end without a word; what it said is shown if it fails. On a terminal the seconds go by."""
    started = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)
            if sys.stdout.isatty():
                print(f"\r      {time.monotonic() - started:.0f} s \r", end="", flush=True)
        if process.returncode != 0:
            said.seek(0)
            sys.stderr.writelines(said.readlines()[-SHOWN_LINES:])
            raise SetupError(f"{what} failed, see above: mend the cause and run the same command again, it continues")


def make_venv(folder: Path) -> Path:
    """The environment's python; a folder whose python does not start (a copied or orphaned one) is made anew."""
    python = folder / "bin" / "python"
    if python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    try:
        import ensurepip  # noqa: F401 - Debian ships neither without python3-venv
        import venv  # noqa: F401
    except ImportError as exc:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SetupError(f"{sys.executable} has no venv module: `apt-get install {package}`, or PYTHON=...") from exc
    run([sys.executable, "-m", "venv", "--clear", str(folder)], "making the environment")
    return python


def install_torch(python: Path) -> None:
    """The build that fits this machine, then from the usual sources what it asks for."""
    requirement = torch_requirement()
    if not is_installed(python, requirement):
        install_torch_alone(python, requirement)
    else:
        say("serve 2/3", f"{requirement} is there already")
    run(constrained(python, requirement), "installing what torch asks for")


def is_installed(python: Path, requirement: str) -> bool:
    """Whether this very version is there, whichever build of it."""
    name, version = requirement.split("==")
    present = "import importlib.metadata as m, sys; sys.exit(m.version(sys.argv[1]).split('+')[0] != sys.argv[2])"
    return subprocess.run([str(python), "-c", present, name, version], capture_output=True).returncode == 0


def install_torch_alone(python: Path, requirement: str) -> None:
    source = choose_torch(
        override=os.environ.get("TORCH_INDEX"),
        linux=sys.platform == "linux",
        driver=has_nvidia_driver(),
        local_wheel=lambda: find_local_wheel(python, requirement),
        cpu_index_answers=lambda: cpu_index_answers(python, requirement),
    )
    say("serve 2/3", f"{requirement}: {source.why}")
    index = ["--index-url", source.index] if source.index else []
    run(pip(python, "install", "--no-deps", *index, requirement), "installing torch")


def constrained(python: Path, *arguments: str) -> list[str]:
    """Conflicts are not warned about: UCX lies in a developer's environment without what it asks for, on purpose."""
    return pip(python, "install", "--no-warn-conflicts", "--constraint", "constraints.txt", *arguments)


def install_serve(folder: Path) -> None:
    """Build tools first, then the project without build isolation: nothing outside the constraints is fetched."""
    say("serve 1/3", f"environment in {os.path.relpath(folder)}, with {sys.executable}")
    python = make_venv(folder)
    run(constrained(python, "setuptools"), "installing setuptools")
    install_torch(python)
    say("serve 3/3", "disagg (editable), with transformers and the packages of its router and workers")
    run(constrained(python, "--no-build-isolation", "--editable", "."), "installing disagg")


def install_dev(folder: Path) -> None:
    """Added to what serves."""
    python = folder / "bin" / "python"
    say("dev 1/2", "pytest, hypothesis, mypy, ruff, triton and what else `make test` and `make check` run")
    run(constrained(python, *dev_requirements()), "installing the developer's tools")
    say("dev 2/2", "UCX, for the tests of the `ucx` data plane")
    run(constrained(python, "--no-deps", *dev_requirements("ucx")), "installing UCX")


def say(step: str, text: str) -> None:
    print(f"[{step}] {text}", flush=True)


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    stage, folder = arguments[0], Path(arguments[1]).absolute()
    try:
        if sys.version_info < OLDEST_PYTHON:
            have, need = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
            raise SetupError(
                f"{sys.executable} is Python {have}, disagg needs {need} or later: `make PYTHON=python{need}`"
            )
        {"serve": install_serve, "dev": install_dev}[stage](folder)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    (folder / MARKERS[stage]).touch()
    free = shutil.disk_usage(folder).free / 1e9
    say(f"{stage} done", f"{time.monotonic() - started:.0f} s, {free:.0f} GB of disk left")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
