"""Lists what rules can find of bad English: sentences whose subject is no noun of the domain, long commit subjects.

The subject of a sentence is a noun of the domain: the peer, the caller, the receiver, the block. `who`, `whoever`,
`somebody` and `nobody` are for people. Read are docstrings, comments and messages of the product, and the docs. What
stays is listed under `[tool.check_english.kept]` in pyproject.toml with its reason.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = re.compile(r"\b(who|whom|whoever|somebody|nobody|anybody)\b", re.IGNORECASE)
SUBJECT_LENGTH = 72


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a person reads in a file: comments and strings of Python, every line of a page."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def files(root: Path) -> list[Path]:
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "deploy").rglob("*.md")]
    return sorted([*(root / "disagg").rglob("*.py"), *pages])


def found_words(root: Path) -> Iterator[tuple[str, str]]:
    """("path:line", the line) of each such word."""
    for path in files(root):
        for line, text in prose_of(path):
            if WORDS.search(text):
                yield f"{path.relative_to(root).as_posix()}:{line}", text.strip()


def long_subjects(root: Path, since: str) -> Iterator[tuple[str, str]]:
    """Subjects of commits after `since`, which is named so that history stays as it was written."""
    command = ["git", "log", "--no-merges", "--format=%h %s", f"{since}..HEAD"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        commit, subject = line.split(" ", 1)
        if len(subject) > SUBJECT_LENGTH:
            yield f"commit {commit}", subject


def main() -> int:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["check_english"]
    kept: dict[str, str] = table.get("kept", {})
    found = [*found_words(ROOT), *long_subjects(ROOT, table["since"])]
    rest = [(place, text) for place, text in found if not any(phrase in text for phrase in kept)]
    for place, text in rest:
        print(f"{place}: {text}")
    print(f"{len(rest)} places to rewrite, {len(found) - len(rest)} kept with a reason", file=sys.stderr)
    return 1 if rest else 0


if __name__ == "__main__":
    sys.exit(main())
