"""What may be imported by which name, and by whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("cache", "kernels", "transceiver")
IMPORTER_OF_TRANSFORMERS = "disagg/engine/model/hf.py"


def python(*arguments: str, cwd: Path) -> str:
    """stdout of a Python that sees neither its folder nor PYTHONPATH."""
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", LINKS)
def test_each_top_level_link_is_relative_and_resolves(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("disagg") / name
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKS)
def test_ruff_bans_the_bare_names(name: str, tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text(f"import {name}\n\nprint({name})\n")
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", "--select", "TID251"]
    if not Path(ruff[0]).exists():
        pytest.skip("ruff is not installed beside this Python")
    found = subprocess.run(
        [*ruff, "--config", str(ROOT / "pyproject.toml"), str(source)], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert f"import disagg.{name}" in found.stdout


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["in the repository", "elsewhere"])
def test_a_safe_path_python_finds_disagg_and_not_the_links(cwd: Path) -> None:
    """Workers are started with `python -P`: the folder they start in must not decide what `kernels` is."""
    code = (
        "import importlib.util as u, disagg; print([n for n in ('cache', 'kernels', 'transceiver') if u.find_spec(n)])"
    )
    assert python("-c", code, cwd=cwd).strip() == "[]"


def test_the_kernels_package_has_no_version_and_imports_nothing_heavy() -> None:
    """transformers asks any package called `kernels` for its version; ours must not answer."""
    heavy = "{'transformers', 'triton'} & {*sys.modules}"
    code = f"import sys, disagg.kernels as k; print(hasattr(k, '__version__'), *{heavy})"
    assert python("-c", code, cwd=ROOT).split() == ["False"]


def test_one_module_alone_imports_transformers() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "disagg").rglob("*.py")
        if "transformers" in imported_names(path)
    }
    assert importers <= {IMPORTER_OF_TRANSFORMERS}


def import_transformers(*, guarded: bool, cwd: Path, flags: tuple[str, ...] = ("-P",), path: str = "") -> str:
    """stderr of a fresh Python that imports two model classes; empty when that went well."""
    guard = "import disagg.engine.model.hf; " if guarded else ""
    code = f"{guard}from transformers import GptOssForCausalLM, LlamaForCausalLM"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def test_a_worker_imports_transformers_in_the_repository() -> None:
    assert import_transformers(guarded=True, cwd=ROOT) == ""


def test_a_worker_imports_transformers_elsewhere() -> None:
    assert import_transformers(guarded=True, cwd=Path("/")) == ""


def test_the_link_on_the_path_does_not_disturb_transformers_without_the_guard() -> None:
    """What someone gets who starts `python` in the repository."""
    assert import_transformers(guarded=False, cwd=ROOT, flags=()) == ""


@pytest.fixture
def hostile_kernels(tmp_path: Path) -> str:
    """A folder with a package called `kernels` that cannot be imported, as one that needs a GPU would be."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ModuleNotFoundError('no GPU here')\n")
    return str(tmp_path)


def test_the_guard_keeps_transformers_away_from_any_package_called_kernels(hostile_kernels: str) -> None:
    assert import_transformers(guarded=True, cwd=Path("/"), path=hostile_kernels) == ""


def test_without_the_guard_such_a_package_breaks_transformers(hostile_kernels: str) -> None:
    """The control: should this fail, transformers no longer looks, and the guard may go."""
    assert "Error" in import_transformers(guarded=False, cwd=Path("/"), path=hostile_kernels)


def test_tests_are_no_package_and_pytest_uses_importlib() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in options["addopts"]
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_version_is_outside_the_window_transformers_reads_for_kernels() -> None:
    """If a distribution of ours ever provided `kernels`, these versions would break `import transformers`."""
    import disagg

    assert re.fullmatch(r"0\.(16|17|18)\..*", disagg.__version__) is None
