"""What is declared is imported, and every range has a lower bound that can be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.tools import load_tool

ROOT = Path(__file__).resolve().parents[2]
NOTHING: dict[str, dict[str, str]] = {"not-imported": {}, "not-declared": {}}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_tool("check_dependencies")


@pytest.fixture
def lowest(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "setup_venv", load_tool("setup_venv"))
    return load_tool("setup_lowest")


def test_an_import_that_nothing_declares_is_found(check: ModuleType) -> None:
    modules = {"yaml": {"pyyaml"}, "numpy": {"numpy"}}
    (sentence,) = check.findings("disagg", modules, {"numpy"}, also=set(), excused=NOTHING)
    assert sentence == "disagg: `yaml` is imported and no dependency declares pyyaml"
    assert check.findings("disagg", modules, {"numpy"}, also={"pyyaml"}, excused=NOTHING) == []


def test_a_declaration_that_nothing_imports_is_found_unless_it_has_a_reason(check: ModuleType) -> None:
    (sentence,) = check.findings("disagg", {}, {"numpy"}, also=set(), excused=NOTHING)
    assert sentence == "disagg: `numpy` is declared and imported nowhere"
    excused = {**NOTHING, "not-imported": {"NumPy": "a reason"}}
    assert check.findings("disagg", {}, {"numpy"}, also=set(), excused=excused) == []


def test_imports_are_found_wherever_they_stand(check: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b, c\nfrom . import d\ndef f():\n    from e.f import g\n")
    assert check.imported_modules([path]) == {"a", "c", "e"}


def test_names_are_compared_as_pip_does(check: ModuleType) -> None:
    assert check.canonical('Prometheus_Client>=0.21; python_version > "3"') == "prometheus-client"


def test_a_lower_bound_becomes_a_pin(lowest: ModuleType) -> None:
    assert lowest.lowest("typer>=0.15.4") == "typer==0.15.4"
    assert lowest.lowest("torch>=2.11,<2.14; sys_platform == 'linux'") == "torch==2.11"


def test_a_range_without_a_lower_bound_is_refused(lowest: ModuleType) -> None:
    with pytest.raises(lowest.SetupError, match="`types-PyYAML` has no lower bound"):
        lowest.lowest("types-PyYAML")


def test_every_dependency_has_a_lowest_version_and_torch_comes_first(lowest: ModuleType) -> None:
    versions = lowest.lowest_versions()
    assert versions[0].startswith("torch==")
    assert {line.split("==")[0] for line in versions} >= {"transformers", "typer", "pyzmq", "setuptools"}


def test_every_range_of_the_project_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [\n")[1].split("\n]")[0]
    for line in text.splitlines():
        assert line.partition(" # ")[2].strip(), line


def test_torch_stays_the_pinned_one_where_the_lowest_cannot_be_reached(
    lowest: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(lowest, "cpu_index_answers", lambda python, requirement: False)
    assert lowest.choose_torch(Path("python"), "torch==2.11") == (lowest.pinned_torch(), [])
    assert "the pinned one: no CPU build of torch==2.11 can be reached" in capsys.readouterr().out
    monkeypatch.setattr(lowest, "cpu_index_answers", lambda python, requirement: True)
    assert lowest.choose_torch(Path("python"), "torch==2.11") == ("torch==2.11", ["--index-url", lowest.CPU_INDEX])
