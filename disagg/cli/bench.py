"""`disagg bench`: measurements of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from disagg.config.errors import ConfigError

app = typer.Typer(help="Measure this machine.", rich_markup_mode=None, no_args_is_help=True)

DIGESTS = ("on", "off", "both")


@app.command("transfer", help="Time KV transfers between two processes, beside memcpy, NIXL and Mooncake.")
def transfer(
    planes: Annotated[
        str, typer.Option(help="Which to run, by name with commas [default: all that are installed]", metavar="TEXT")
    ] = "",
    cases: Annotated[str, typer.Option(help="Cases a, b, c, d: what is moved", metavar="TEXT")] = "a,b,c,d",
    rounds: Annotated[int, typer.Option(help="Repetitions of each, in turns", min=1)] = 9,
    digests: Annotated[str, typer.Option(help="Integrity digests of our planes: on, off or both")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    from disagg.bench.cases import CASES
    from disagg.bench.contenders import ALL
    from disagg.bench.transfer import bench_transfer

    chosen_planes = _names("planes", planes or ",".join(ALL), ALL)
    chosen_cases = _names("cases", cases, tuple(CASES))
    (chosen_digests,) = _names("digests", digests, DIGESTS)
    raise typer.Exit(bench_transfer(chosen_planes, chosen_cases, rounds, chosen_digests, as_json))


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names in `text`; an unknown one is the user's mistake."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"`--{option}` is `{text}`: expected some of {', '.join(known)}")
    return names
