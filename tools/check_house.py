"""What a reader relies on: no two product classes share a name, every name in a docstring exists, every package says
what it holds.

A reference is a word in backticks that looks like one: `disagg.` and a dotted name, a path that ends in `.py`, a class
(`CamelCase`, alone or before a dot), or `protocol.md section N`. The code is read, not run.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_DOTTED = re.compile(r"`(disagg(?:\.\w+)+)(?:\(\))?`")
_FILE = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|md|c|toml))`")
_CLASS = re.compile(r"`(?:\w+\.)?([A-Z][a-z]\w+)(?:\.\w+)*(?:\(\))?`")
_ELSEWHERE = {
    "Authorization",  # a header of HTTP
    "CancelledError",  # asyncio's
    "ContextTerminated",  # pyzmq's
    "Linear",  # torch's
    "MemAvailable",  # a line of /proc/meminfo
}
_SECTION = re.compile(r"\b([a-z]+)\.md section (\d+)")


@dataclass(frozen=True, slots=True)
class Module:
    """One file of the product: its dotted name, its path under the root, and its parsed text."""

    name: str
    path: str
    tree: ast.Module


def modules(root: Path) -> list[Module]:
    found = []
    for path in sorted((root / "disagg").rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, relative.as_posix(), ast.parse(path.read_text(), filename=str(relative))))
    return found


def shared_names(product: list[Module]) -> Iterator[str]:
    """Public classes of one name in two modules. Private ones are a module's own business."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in product:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module.path)
    for name, paths in sorted(places.items()):
        if len(paths) > 1:
            yield f"{paths[1]}: class {name} has its name from {paths[0]}; each names its own noun"


def silent_packages(product: list[Module]) -> Iterator[str]:
    for module in product:
        if module.path.endswith("__init__.py") and not ast.get_docstring(module.tree):
            yield f"{module.path}: no docstring; say in a line what the package holds"


def members(tree: ast.AST) -> dict[str, ast.AST]:
    """What one module or class defines: functions, classes, assigned names, imported names, attributes of `self`."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[node.name] = node
            case ast.Assign(targets=targets):
                found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name: node for alias in names}
    if isinstance(tree, ast.ClassDef):
        found |= {
            node.attr: node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)
        }
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def resolves(dotted: str, by_name: dict[str, Module]) -> bool:
    """Whether `dotted` is a module of ours or a path of attributes inside one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        if module := by_name.get(".".join(parts[:end])):
            node: ast.AST | None = module.tree
            for part in parts[end:]:
                node = members(node).get(part) if node is not None else None
            return node is not None
    return False


def texts(module: Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each string that stands alone as a statement: docstrings, also those below constants."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def known_words(product: list[Module]) -> set[str]:
    """What a capitalised word in backticks may name: anything that the product defines, Python's own, or elsewhere."""
    words = {name for module in product for node in ast.walk(module.tree) for name in members(node)}
    return words | set(dir(builtins)) | _ELSEWHERE


def broken_class_references(where: str, text: str, words: set[str]) -> Iterator[str]:
    for name in _CLASS.findall(text):
        if name not in words:
            yield f"{where}: there is no `{name}`"


def broken_references(where: str, text: str, by_name: dict[str, Module], root: Path) -> Iterator[str]:
    for name in _DOTTED.findall(text):
        if not resolves(name, by_name):
            yield f"{where}: `{name}` does not exist"
    for path in _FILE.findall(text):
        if not (root / path).exists():
            yield f"{where}: `{path}` does not exist"
    for page, section in _SECTION.findall(text):
        if not _has_section(root / "docs" / f"{page}.md", section):
            yield f"{where}: docs/{page}.md has no section {section}"


def _has_section(page: Path, number: str) -> bool:
    return page.exists() and re.search(rf"^## {number}\. ", page.read_text(), re.MULTILINE) is not None


def complaints(root: Path) -> list[str]:
    product = modules(root)
    by_name = {module.name: module for module in product}
    found = [*shared_names(product), *silent_packages(product)]
    words = known_words(product)
    for module in product:
        for line, text in texts(module):
            found += broken_references(f"{module.path}:{line}", text, by_name, root)
            found += broken_class_references(f"{module.path}:{line}", text, words)
    for page in sorted([*(root / "docs").glob("*.md"), *root.glob("*.md")]):
        found += broken_references(page.relative_to(root).as_posix(), page.read_text(), by_name, root)
    return found


def main() -> int:
    found = complaints(ROOT)
    for line in found:
        print(line, file=sys.stderr)
    print(f"house: {len(modules(ROOT))} modules, {len(found)} complaints")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
