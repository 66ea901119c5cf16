"""Figures as a table for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.box import SIMPLE
from rich.table import Table as RichTable

from disagg.config.quantities import format_nbytes
from disagg.simulate.figures import Figures

COLUMNS: Final = (
    *("fleet", "policy", "TTFT p50", "p90", "p99 ms", "ITL p50", "p99 ms", "good", "goodput/s", "tokens/s"),
    *("hits", "moved", "busy", "batch", "refused"),
)
_LETTERS: Final = {"prefill": "P", "decode": "D", "both": "B", "front end": "F"}


def table_of(found: Sequence[Figures]) -> RichTable:
    """One row for each run."""
    table = RichTable(box=SIMPLE)
    for name in COLUMNS:
        table.add_column(name, no_wrap=True, justify="left" if name in ("fleet", "policy") else "right")
    for one in found:
        table.add_row(*row_of(one))
    return table


def row_of(one: Figures) -> tuple[str, ...]:
    busy = " ".join(f"{_LETTERS[role]} {part:.0%}" for role, part in one.busy.items())
    return (
        one.fleet,
        one.policy,
        *(_ms(one.ttft_s.get(part)) for part in ("p50", "p90", "p99")),
        *(_ms(one.itl_s.get(part)) for part in ("p50", "p99")),
        f"{one.good:.1%}",
        f"{one.goodput:.2f}",
        f"{one.tokens_per_s:.0f}",
        f"{one.hit_rate:.1%}",
        format_nbytes(one.moved_nbytes),
        busy,
        f"{one.batch:.1f}",
        str(one.num_refused),
    )


def json_of(found: Sequence[Figures], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "runs": [one.as_json() for one in found]}


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
