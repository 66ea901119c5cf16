"""The `disagg` command. Results go to stdout, logs to stderr; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import functools
import gc
import sys
from typing import Annotated, Any, Final, get_args

import typer

from disagg import __version__
from disagg.cli.bench import app as bench_app
from disagg.cli.drain import ADMIN
from disagg.cli.drain import drain as drain_worker
from disagg.cli.options import command
from disagg.cli.output import forgive_output, lost_result, open_closed_descriptors
from disagg.cli.process import INTERRUPTED, USER_ERROR, run_router, run_worker
from disagg.cli.surroundings import leave_deleted_folder, name_temporary_folder
from disagg.config.errors import ConfigError
from disagg.config.settings import (
    DemoSettings,
    PlanSettings,
    Role,
    RouterSettings,
    SimulateSettings,
    UpSettings,
    WorkerSettings,
)
from disagg.config.signals import raise_on_interrupt

app = typer.Typer(
    help="Serve a language model with prefill and decode on separate workers.",
    epilog="Every option is also a `DISAGG_*` variable and a key of the `--config` file: flag > variable > file.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FAILED: Final = 1
FLAG_VALUES = {"--swa-scratch": "on"}
INHERITED = ("announce_fd", "secret_fd")
HELP_OF_ROLE = {
    "prefill": "Start one worker that computes prompts and sends their KV.",
    "decode": "Start one worker that receives KV and generates.",
    "both": "Start one worker that does both, without a transfer.",
}


# click's UsageError, wherever this typer keeps its click
USAGE_ERROR: Final[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")


def _up(settings: UpSettings) -> int:
    from disagg.cli.up import up

    return up(settings)


def _demo(settings: DemoSettings) -> int:
    from disagg.cli.demo import demo

    return demo(settings)


def _plan(settings: PlanSettings, *, json: bool | None) -> int:
    from disagg.cli.plan import plan

    return plan(settings, json=json)


def _simulate(settings: SimulateSettings, *, trace: str, json: bool | None) -> int:
    from disagg.cli.simulate import simulate

    return simulate(settings, trace, json=json)


app.command("up", help="Start router and workers on this machine.")(command(UpSettings, _up))
app.command("demo", help="Serve the bundled model for one request and show what it moved.")(
    command(DemoSettings, _demo)
)
app.command("plan", help="Show what a prompt holds and moves, from config.json alone.")(
    command(PlanSettings, _plan, switches={"json": "Print JSON"})
)
app.command(
    "simulate",
    short_help="Play a trace to fleets that do not exist.",
    help="Play a trace of requests to fleets that do not exist, at measured rates.",
)(
    command(
        SimulateSettings,
        _simulate,
        switches={"json": "Print JSON"},
        arguments={"trace": "Trace file (JSON lines, ours or Mooncake's), or one to make up: chat, bursty or long"},
    )
)
app.command("router", help="Start the router: HTTP API, registration, dispatch.")(
    command(RouterSettings, run_router, hidden=INHERITED)
)
for _role in get_args(Role):
    app.command(_role, help=HELP_OF_ROLE[_role])(
        command(WorkerSettings, functools.partial(run_worker, _role), hidden=INHERITED)
    )


app.add_typer(bench_app, name="bench")


@app.command("drain", help="Empty a worker: its answers go on elsewhere, and none begins.")
def drain(
    worker: Annotated[str, typer.Argument(help="Its `--worker-id`, as `GET /workers` names it", metavar="WORKER")],
    admin: Annotated[
        str, typer.Option(help="Admin listener of the router, as it says when it starts", metavar="URL")
    ] = ADMIN,
    wait: Annotated[bool, typer.Option(help="Return when the worker has no request any more")] = True,
    undo: Annotated[bool, typer.Option("--undo", help="Give the worker requests again")] = False,
) -> None:
    raise typer.Exit(drain_worker(worker, admin, wait=wait, undo=undo))


@app.command("version", help="Print the version.")
def version() -> None:
    typer.echo(__version__)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def disagg(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command itself; `_print_version` has answered the only one."""


def run() -> None:
    """The whole process: `disagg.__main__` calls this."""
    open_closed_descriptors()
    forgive_output()
    leave_deleted_folder()
    name_temporary_folder()
    raise_on_interrupt()
    code = main(sys.argv[1:])
    if (why := lost_result()) and code == 0:
        print(f"disagg: {why}", file=sys.stderr)  # noqa: T201
        code = FAILED
    gc.freeze()  # all memory goes with the process: a last collection of torch's modules would take a second of CPU
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run one command line; its exit code. Errors of the command line become one sentence."""
    try:
        code = app(spell_out(argv) or ["--help"], prog_name="disagg", standalone_mode=False)
    except ConfigError as exc:
        return _refuse(str(exc))
    except USAGE_ERROR as exc:
        path = exc.ctx.command_path if exc.ctx is not None else "disagg"
        return _refuse(f"{exc.format_message().rstrip('.')}: see `{path} --help`")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def spell_out(argv: list[str]) -> list[str]:
    """Give flags whose value may be left out the value that this means: `--swa-scratch` is `--swa-scratch=on`."""
    followers = [*argv[1:], "-"]
    return [
        f"{word}={FLAG_VALUES[word]}" if word in FLAG_VALUES and follower.startswith("-") else word
        for word, follower in zip(argv, followers, strict=False)
    ]


def _refuse(sentence: str) -> int:
    print("disagg:", " ".join(sentence.split()), file=sys.stderr)  # noqa: T201
    return USER_ERROR
