"""The checks of the house see what they should: shared names, broken references, silent packages, loaded torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch  # noqa: F401  this process is the control of the check for it
from support.tools import load_tool


@pytest.fixture(scope="module")
def house() -> ModuleType:
    return load_tool("check_house")


@pytest.fixture(scope="module")
def english() -> ModuleType:
    return load_tool("check_english")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A product of one package and two modules without a fault."""
    (tmp_path / "disagg").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "protocol.md").write_text("# The transfer\n\n## 1. What must move\n")
    (tmp_path / "disagg" / "__init__.py").write_text('"""The product."""\n')
    (tmp_path / "disagg" / "a.py").write_text(
        '"""See `disagg.b.Side.end` and protocol.md section 1."""\nclass Own: ...\n'
    )
    (tmp_path / "disagg" / "b.py").write_text("class Side:\n    def end(self):\n        self.at = 1\n")
    return tmp_path


def test_a_class_that_is_named_but_not_there_is_a_complaint(house: ModuleType, tree: Path) -> None:
    (tree / "disagg" / "a.py").write_text('"""As `b.Side.end` says, not `Sides.end`; raises `ValueError`."""\n')
    assert house.complaints(tree) == ["disagg/a.py:1: there is no `Sides`"]


def test_a_house_in_order_has_no_complaints(house: ModuleType, tree: Path) -> None:
    assert house.complaints(tree) == []


def test_two_classes_of_one_name_are_named_with_both_files(house: ModuleType, tree: Path) -> None:
    (tree / "disagg" / "c.py").write_text("class Side: ...\nclass _Own: ...\nclass _Side: ...\n")
    (line,) = house.complaints(tree)
    assert "class Side" in line
    assert "disagg/b.py" in line
    assert "disagg/c.py" in line


@pytest.mark.parametrize(
    "reference",
    ["`disagg.b.Sides`", "`disagg.b.Side.ends`", "`disagg.nothing`", "`docs/missing.md`", "protocol.md section 9"],
)
def test_a_reference_to_nothing_is_named_in_docstrings_and_pages(house: ModuleType, tree: Path, reference: str) -> None:
    (tree / "disagg" / "c.py").write_text(f'"""See {reference}."""\n')
    (line,) = house.complaints(tree)
    assert line.startswith("disagg/c.py:1")
    (tree / "disagg" / "c.py").unlink()
    (tree / "docs" / "page.md").write_text(f"See {reference}.\n")
    (line,) = house.complaints(tree)
    assert line.startswith("docs/page.md")


def test_attributes_of_an_instance_count_as_names(house: ModuleType, tree: Path) -> None:
    (tree / "disagg" / "c.py").write_text('"""See `disagg.b.Side.at`."""\n')
    assert house.complaints(tree) == []


def test_a_package_without_a_docstring_is_named(house: ModuleType, tree: Path) -> None:
    (tree / "disagg" / "__init__.py").write_text("")
    (line,) = house.complaints(tree)
    assert line.startswith("disagg/__init__.py: no docstring")


def test_sentences_without_a_noun_are_found_in_comments_strings_and_pages(english: ModuleType, tree: Path) -> None:
    (tree / "disagg" / "c.py").write_text('whoever = 1  # whoever waits\nraise ValueError("nobody asked")\n')
    (tree / "docs" / "page.md").write_text("Somebody may ask.\n")
    assert [place for place, _ in english.found_words(tree)] == ["disagg/c.py:1", "disagg/c.py:2", "docs/page.md:1"]


def test_commit_subjects_past_the_bound_are_found_and_older_ones_are_not(english: ModuleType, tree: Path) -> None:
    def commit(subject: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", subject], cwd=tree, check=True)

    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    commit("a" * 80)
    subprocess.run(["git", "tag", "then"], cwd=tree, check=True)
    commit("b" * 73)
    commit("c" * 72)
    assert [subject for _, subject in english.long_subjects(tree, "then")] == ["b" * 73]


def test_a_process_with_torch_is_seen_and_one_without_is_not() -> None:
    router = load_tool("check_router")
    assert router.has_torch(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as plain:
        assert not router.has_torch(plain.pid)
        assert {os.getpid(), plain.pid} <= set(router.family(os.getpid()))
