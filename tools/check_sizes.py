"""Bounds on file and function size, read from `[tool.check_sizes]` in pyproject.toml.

A file or function past its bound fails unless it is listed there with a reason; a listed one that no longer
needs its place fails too, so that the list stays true.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Size:
    """Lines of one file ("disagg/a.py") or one function ("disagg/a.py:Class.method")."""

    name: str
    num_lines: int
    bound: int


@dataclass(frozen=True, slots=True)
class Bounds:
    file_lines: int
    function_lines: int
    longer: dict[str, str]  # name -> the reason why it may be longer


def read_bounds(pyproject: Path) -> Bounds:
    table = tomllib.loads(pyproject.read_text())["tool"]["check_sizes"]
    return Bounds(table["file-lines"], table["function-lines"], table.get("longer", {}))


def python_files(root: Path) -> list[Path]:
    """Tracked and new Python files; the top-level links are listed by git as links, not walked."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    return [root / name for name in listed if (root / name).is_file()]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines) of every function; one that is nested counts in its parent and by itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if not isinstance(node, ast.ClassDef):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def measure(files: Iterable[Path], root: Path, bounds: Bounds) -> tuple[list[Size], list[Size]]:
    """Sizes of all files and of all functions."""
    file_sizes, function_sizes = [], []
    for path in files:
        name, text = path.relative_to(root).as_posix(), path.read_text()
        file_sizes.append(Size(name, len(text.splitlines()), bounds.file_lines))
        for function, num_lines in functions(ast.parse(text, filename=name)):
            function_sizes.append(Size(f"{name}:{function}", num_lines, bounds.function_lines))
    return file_sizes, function_sizes


def complaints(sizes: Iterable[Size], longer: dict[str, str]) -> list[str]:
    over = {size.name: size for size in sizes if size.num_lines > size.bound}
    found = [
        f"{size.name}: {size.num_lines} lines, at most {size.bound}; split it, or list it with a reason"
        for size in over.values()
        if size.name not in longer
    ]
    found += [f"{name}: listed as longer without a reason" for name, reason in longer.items() if not reason.strip()]
    found += [f"{name}: listed as longer, but is not; remove it from the list" for name in longer if name not in over]
    return sorted(found)


def summary(kind: str, sizes: list[Size]) -> str:
    lengths = sorted(size.num_lines for size in sizes)
    if not lengths:
        return f"no {kind}s"
    p90 = lengths[min(len(lengths) - 1, len(lengths) * 9 // 10)]
    median = statistics.median(lengths)
    return f"{len(lengths)} {kind}s: median {median:g} lines, 90th percentile {p90}, longest {lengths[-1]}"


def main() -> int:
    bounds = read_bounds(ROOT / "pyproject.toml")
    files, functions_ = measure(python_files(ROOT), ROOT, bounds)
    shipped = [size for size in files if size.name.startswith("disagg/") and not size.name.endswith("__init__.py")]
    print(summary("file", shipped), "(disagg)")
    print(summary("function", [size for size in functions_ if size.name.startswith("disagg/")]), "(disagg)")
    found = complaints([*files, *functions_], bounds.longer)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
