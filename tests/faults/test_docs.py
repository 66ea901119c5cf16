"""docs/faults.md says what the table says."""

from __future__ import annotations

from support.faults.docs import render
from support.tools import ROOT


def test_the_page_is_written_from_the_table() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == render(), "run: cd tests && python -m support.faults.docs"
