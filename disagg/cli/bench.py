"""`disagg bench`: measurements of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from disagg.cli.options import command
from disagg.config.errors import ConfigError
from disagg.config.settings import RatesSettings

app = typer.Typer(help="Measure this machine.", rich_markup_mode=None)

DIGESTS = ("on", "off", "both")


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    "transfer",
    short_help="Time KV transfers, beside memcpy and others.",
    help="Time KV transfers between two processes, beside memcpy, NIXL and Mooncake.",
)
def transfer(
    planes: Annotated[
        str,
        typer.Option(
            help="Names with commas, of shm, tcp, ucx, zmq (ours), memcpy, memcpy-slots, nixl, nixl-slots, nixl-tcp, "
            "mooncake [default: all that are installed]",
            metavar="TEXT",
        ),
    ] = "",
    cases: Annotated[
        str,
        typer.Option(
            help="What is moved, names with commas: a 128 MiB of an 8B model, b 208 MiB of a small model in many "
            "pieces, c 3.25 MiB of a short prompt, d 128 MiB in 64 pieces",
            metavar="TEXT",
        ),
    ] = "a,b,c,d",
    rounds: Annotated[
        int, typer.Option(help="Times that each is run, in turns with the others", min=1, metavar="INT")
    ] = 9,
    digests: Annotated[
        str,
        typer.Option(
            help="Whether our planes hash what they move, as workers do; both: in turn", metavar="|".join(DIGESTS)
        ),
    ] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    from disagg.bench.cases import CASES
    from disagg.bench.contenders import ALL
    from disagg.bench.transfer import bench_transfer

    chosen_planes = _names("planes", planes or ",".join(ALL), ALL)
    chosen_cases = _names("cases", cases, tuple(CASES))
    (chosen_digests,) = _names("digests", digests, DIGESTS)
    raise typer.Exit(bench_transfer(chosen_planes, chosen_cases, rounds, chosen_digests, as_json))


def _rates(settings: RatesSettings) -> int:
    from disagg.bench.rates import bench_rates

    return bench_rates(settings)


app.command(
    "rates",
    short_help="Time steps, links and the front end, for `simulate`.",
    help="Measure what `disagg simulate --rates` reads: steps with prompts and answers, links, the front end. JSON.",
)(command(RatesSettings, _rates))


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names in `text`; an unknown one is the user's mistake."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"`--{option}` is `{text}`: expected some of {', '.join(known)}")
    return names
