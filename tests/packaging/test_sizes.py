"""The size check sees what it should, and its list of exceptions cannot go stale."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from support.tools import load_tool


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    return load_tool("check_sizes")


def found(sizes: ModuleType, folder: Path, text: str, longer: dict[str, str]) -> list[str]:
    (folder / "a.py").write_text(text)
    bounds = sizes.Bounds(file_lines=8, function_lines=3, longer=longer)
    files, functions = sizes.measure([folder / "a.py"], folder, bounds)
    return sizes.complaints([*files, *functions], bounds.longer)


FOUR_LINES = "class A:\n    async def f(self):\n        x = 1\n        y = 2\n        return x + y\n"


def test_a_function_past_its_bound_is_named(sizes: ModuleType, tmp_path: Path) -> None:
    (line,) = found(sizes, tmp_path, FOUR_LINES, {})
    assert line.startswith("a.py:A.f: 4 lines, at most 3")


def test_a_function_at_its_bound_passes(sizes: ModuleType, tmp_path: Path) -> None:
    assert found(sizes, tmp_path, FOUR_LINES.replace("        y = 2\n", ""), {}) == []


def test_a_file_past_its_bound_is_named(sizes: ModuleType, tmp_path: Path) -> None:
    assert found(sizes, tmp_path, "x = 1\n" * 8, {}) == []
    (line,) = found(sizes, tmp_path, "x = 1\n" * 9, {})
    assert line.startswith("a.py: 9 lines, at most 8")


def test_a_reason_lets_it_pass_and_an_empty_one_does_not(sizes: ModuleType, tmp_path: Path) -> None:
    assert found(sizes, tmp_path, FOUR_LINES, {"a.py:A.f": "a table of fields"}) == []
    assert found(sizes, tmp_path, FOUR_LINES, {"a.py:A.f": " "}) == ["a.py:A.f: listed as longer without a reason"]


def test_a_listed_name_that_is_short_again_is_named(sizes: ModuleType, tmp_path: Path) -> None:
    (line,) = found(sizes, tmp_path, "x = 1\n", {"a.py:A.f": "was long"})
    assert "remove it from the list" in line
