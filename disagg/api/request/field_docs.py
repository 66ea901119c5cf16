"""The page `docs/request-fields.md`, from the table; its head names the command that writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from disagg.api.request.fields import FIELDS, Field

HEADER = """\
# Request fields

Every field of the OpenAI and vLLM APIs is honoured or refused with status 400 whose error names it in `param`; none is
ignored. A field that is in neither table is refused too. `null` means unset.

This page is written by `.venv/bin/python -P -m disagg.api.request.field_docs > docs/request-fields.md`; edit
`disagg/api/request/fields.py`.
"""


def render() -> str:
    """The page as Markdown."""
    return "\n".join([HEADER, "## Honoured", "", *_honoured(), "", "## Refused", "", *_refused(), ""])


def _honoured() -> Iterator[str]:
    yield _row("field", "endpoints", "value", "default", "effect")
    yield _row(*["---"] * 5)
    for field in FIELDS:
        if field.is_honoured:
            yield _row(f"`{field.name}`", _endpoints(field), str(field.check), field.default, field.effect)


def _refused() -> Iterator[str]:
    yield _row("field", "endpoints", "reason")
    yield _row(*["---"] * 3)
    for field in FIELDS:
        if not field.is_honoured:
            yield _row(f"`{field.name}`", _endpoints(field), field.effect)


def _endpoints(field: Field) -> str:
    return ", ".join(f"`{endpoint}`" for endpoint in field.endpoints)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(render())
