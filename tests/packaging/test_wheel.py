"""The wheel carries disagg, all of it, and takes no other name."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no `build/` folder of an earlier run can add to it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, the build backend, is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "disagg", source / "disagg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cache", "kernels", "transceiver"):
        (source / name).symlink_to((ROOT / name).readlink())
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=100)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


def modules(folder: Path) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}


def test_the_only_top_level_name_is_disagg(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"disagg"}
    (top_level,) = (name for name in wheel.namelist() if name.endswith("top_level.txt"))
    assert wheel.read(top_level).split() == [b"disagg"]


def test_every_module_of_the_tree_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules(ROOT / "disagg")


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without `__init__.py` would be left out of the wheel without a word."""
    folders = {path.parent for path in (ROOT / "disagg").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_demo_model_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    shipped = {path.name: path.read_bytes() for path in (ROOT / "disagg" / "demo_model").iterdir()}
    for name, content in shipped.items():
        assert wheel.read(f"disagg/demo_model/{name}") == content


def test_the_metadata_names_version_licence_and_command(wheel: zipfile.ZipFile) -> None:
    by_name = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(by_name["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "disagg = disagg.__main__:run" in by_name["entry_points.txt"]
    assert "Apache License" in by_name["LICENSE"]


def test_one_wheel_serves_every_python_of_a_platform(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    written = Parser().parsestr(wheel.read(name).decode())
    assert re.fullmatch(r"py3-none-linux_\w+", written["Tag"])
    assert f"-{written['Tag']}.whl" in str(wheel.filename)
    shared = [name for name in wheel.namelist() if name.endswith(".so")]
    assert set(shared) <= {"disagg/kernels/_native.so"}, "a name that binds it to one Python"
    assert bool(shared) == (shutil.which("cc") is not None)


def test_the_page_of_the_package_is_the_readme_and_is_read_as_markdown(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_no_extra_can_move_an_installed_torch(wheel: zipfile.ZipFile) -> None:
    """An extra that names torch, or caps what torch pins exactly, would make pip replace the build that is there."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    required = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    extras = [line for line in required if "extra ==" in line]
    assert len(extras) == 3
    for line in extras:
        assert not line.startswith("torch")
        assert "<" not in line
        assert "==" not in line.split(";")[0]
