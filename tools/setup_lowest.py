"""Make a virtual environment with the lowest version of every dependency that pyproject.toml allows.

    python3 tools/setup_lowest.py .venv-lowest

Run by `make test-lowest`. The tests' own tools are the pinned ones of constraints.txt. torch is the lowest where its
CPU build can be had (TORCH_INDEX names another index), else the pinned one, and which it is gets said.
The standard library is all that may be used here.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from setup_venv import CPU_INDEX, ROOT, SetupError, cpu_index_answers, is_installed, make_venv, pip, run, say
from setup_venv import torch_requirement as pinned_torch

TOOLS = ("hypothesis", "jsonschema", "openai", "pytest", "pytest-rerunfailures", "pytest-timeout", "pytest-xdist")
"""What the tests import or are run by; safetensors and setuptools have lower bounds that matter."""
WITH_BOUNDS = ("safetensors", "setuptools")


def lowest(requirement: str) -> str:
    """`typer>=0.15.4,<1` -> `typer==0.15.4`. A range without a lower bound cannot be tested."""
    found = re.match(r"\s*([\w.-]+)[^;]*?>=\s*([\w.]+)", requirement)
    if found is None:
        raise SetupError(f"pyproject.toml: `{requirement}` has no lower bound: write the oldest version that works")
    return f"{found[1]}=={found[2]}"


def lowest_versions() -> list[str]:
    """Of the project's dependencies, torch first, and of the developers' packages with bounds that matter."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = [line for line in project["dependency-groups"]["dev"] if re.match(r"[\w-]+", line)[0] in WITH_BOUNDS]  # type: ignore[index]
    return sorted(
        map(lowest, [*project["project"]["dependencies"], *tools]), key=lambda line: not line.startswith("torch==")
    )


def pinned(names: Iterable[str]) -> list[str]:
    """Their lines of constraints.txt."""
    wanted = set(names)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("==")[0] in wanted]


def choose_torch(python: Path, requirement: str) -> tuple[str, list[str]]:
    """The requirement to install, and pip's options for its index."""
    index = os.environ.get("TORCH_INDEX") or (CPU_INDEX if cpu_index_answers(python, requirement) else None)
    if index is not None:
        say("lowest 2/3", f"{requirement}, from {index}")
        return requirement, ["--index-url", index]
    say("lowest 2/3", f"{pinned_torch()}, the pinned one: no CPU build of {requirement} can be reached")
    return pinned_torch(), []


def install(folder: Path) -> None:
    say("lowest 1/3", f"environment in {os.path.relpath(folder)}, with {sys.executable}")
    python = make_venv(folder)
    torch, *others = lowest_versions()
    torch, index = choose_torch(python, torch)
    if not is_installed(python, torch):
        run(pip(python, "install", "--no-deps", *index, torch), "installing torch")
    say("lowest 3/3", ", ".join(others))
    required = [torch, *others, *pinned(TOOLS)]
    run(pip(python, "install", "--no-warn-conflicts", *required), "installing the lowest versions")
    run(pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", "."), "installing disagg")


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]).absolute()
    try:
        install(folder)
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    (folder / ".ready").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
