"""Prose paragraphs out of documentation: Markdown, reStructuredText, plain text, HTML, and docstrings of Python."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

SHORTEST, LONGEST = 40, 2000  # characters: below are headings and labels, above are tables and licences
LEAST_LETTERS: Final = 0.75  # of all characters, spaces included: prose has about 0.8, code and tables less

_FENCE: Final = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])")  # Markdown: the text stays, the target goes
_ROLE: Final = re.compile(r":[\w:+-]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")  # reStructuredText: :func:`name`
_MARKS: Final = re.compile(r"[`*]+")


def is_prose(paragraph: str) -> bool:
    """A sentence or more of plain ASCII English, judged by its shape."""
    if not SHORTEST <= len(paragraph) <= LONGEST or not paragraph.isascii():
        return False
    if not paragraph[0].isalpha() or paragraph[-1] not in ".!?":
        return False
    letters = sum(character.isalpha() for character in paragraph)
    return letters / len(paragraph) >= LEAST_LETTERS and len(paragraph.split()) >= 6


def plain_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs that begin at the margin, without code blocks, markup and line breaks."""
    for block in re.split(r"\n\s*\n", _FENCE.sub("", text)):
        if block.startswith((" ", "\t", ">>>", "|", "#", "..")):
            continue
        words = _MARKS.sub("", _ROLE.sub(r"\1", _LINK.sub(r"\1", block))).split()
        if is_prose(paragraph := " ".join(words)):
            yield paragraph


def docstring_paragraphs(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return  # templates and tests of broken code are not our concern
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            yield from plain_paragraphs(inspect.cleandoc(docstring)) if docstring else ()


class _Paragraphs(HTMLParser):
    """Text of the `<p>` elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._inside = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data


def html_paragraphs(text: str) -> Iterator[str]:
    parser = _Paragraphs()
    parser.feed(text)
    for found in parser.found:
        yield from plain_paragraphs(" ".join(found.split()))


READERS: Final[dict[str, Callable[[str], Iterator[str]]]] = {
    ".html": html_paragraphs,
    ".md": plain_paragraphs,
    ".py": docstring_paragraphs,
    ".rst": plain_paragraphs,
    ".txt": plain_paragraphs,
}


def gather(paths: Iterable[Path]) -> list[str]:
    """One document per file: its paragraphs, one a line, each paragraph once in all documents.

    Files are read in sorted order, so that the same files give the same documents.
    """
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))}
    seen: set[str] = set()
    documents = []
    for file in sorted(file for file in files if file.suffix in READERS and file.is_file()):
        paragraphs = dict.fromkeys(READERS[file.suffix](file.read_text(errors="replace")))
        fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n".join(fresh))
    return documents
