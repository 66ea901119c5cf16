"""Exit with 1 unless pyproject.toml declares what is imported, and nothing else. Run by `make check`.

    python tools/check_dependencies.py

`disagg` is compared with the project's dependencies and extras; tests, tools, benchmarks, examples and deploy may also
use the dependency groups. `[tool.check_dependencies]` names, with a reason each, what is declared and imported nowhere
(`not-imported`) and what is imported and declared nowhere (`not-declared`).
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEVELOPERS = ("tests", "tools", "benchmarks", "examples", "deploy")


def canonical(requirement: str) -> str:
    """`PyYAML>=6.0 ; python_version > "3"` -> `pyyaml`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


def imported_modules(paths: Iterable[Path]) -> set[str]:
    """Top-level names of every absolute import, wherever in a file it stands."""
    return {name for path in paths for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def own_modules(root: Path) -> set[str]:
    """What needs no package: the standard library, disagg, and the modules of the developers' folders."""
    ours = {path.stem if path.is_file() else path.name for name in DEVELOPERS for path in (root / name).glob("*")}
    return {*sys.stdlib_module_names, "disagg", *ours}


def distributions(modules: Iterable[str]) -> dict[str, set[str]]:
    """The packages that provide each module here; a module that is not installed goes by its own name."""
    provided = packages_distributions()
    return {module: {canonical(name) for name in provided.get(module, [module])} for module in modules}


def findings(
    what: str, modules: dict[str, set[str]], declared: set[str], *, also: set[str], excused: dict[str, dict[str, str]]
) -> list[str]:
    """One sentence for each module that nothing declares, and for each of `declared` that no module needs.

    `also`: declared for others, which these may use.
    """
    undeclared = [
        f"{what}: `{module}` is imported and no dependency declares {' or '.join(sorted(names))}"
        for module, names in sorted(modules.items())
        if not names & (declared | also) and not names & {canonical(name) for name in excused["not-declared"]}
    ]
    needed = {name for names in modules.values() for name in names}
    unneeded = [
        f"{what}: `{name}` is declared and imported nowhere"
        for name in sorted(declared - needed - {canonical(name) for name in excused["not-imported"]})
    ]
    return undeclared + unneeded


def check(root: Path) -> list[str]:
    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    excused = project["tool"]["check_dependencies"]
    extras = project["project"]["optional-dependencies"].values()
    users = {canonical(line) for lines in (project["project"]["dependencies"], *extras) for line in lines}
    developers = {canonical(line) for lines in project["dependency-groups"].values() for line in lines}
    ours = own_modules(root)

    def needed(*folders: str) -> dict[str, set[str]]:
        return distributions(imported_modules(path for name in folders for path in (root / name).rglob("*.py")) - ours)

    everything = needed("disagg", *DEVELOPERS) | distributions(imported_modules(root.glob("*.py")) - ours)
    return [
        *findings("disagg", needed("disagg"), users, also=set(), excused=excused),
        *findings("developers", everything, developers - users, also=users, excused=excused),
    ]


def main() -> int:
    wrong = check(ROOT)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
