"""Turn a settings class into the options of a command, so that flag, variable, YAML key and help cannot drift apart."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from disagg.config.load import check_switches, flag_of, load, off_flag_of, unknown_variables
from disagg.config.settings import ModelSettings, Nbytes, Sizes

NO_SWITCHES: Final[Mapping[str, str]] = MappingProxyType({})

S = TypeVar("S", bound=ModelSettings)


def command(
    cls: type[S],
    action: Callable[..., int],
    *,
    hidden: tuple[str, ...] = (),
    switches: Mapping[str, str] = NO_SWITCHES,
    arguments: Mapping[str, str] = NO_SWITCHES,
) -> Callable[..., None]:
    """A typer command that loads `cls` and exits with `action(settings, **hidden, **switches, **arguments)`.

    `hidden` names integer flags; `switches` (name -> help) ones that say how to show a result, so no settings;
    `arguments` (name -> help) words without a flag that must be given.
    """

    def run(**given: Any) -> None:
        extra = {name: given.pop(name) for name in (*hidden, *switches, *arguments)}
        config = given.pop("config") or os.environ.get("DISAGG_CONFIG")
        flags = {field: _joined(value) for field, value in given.items() if value not in (None, [])}
        check_switches(os.environ)
        settings = load(cls, flags, os.environ, Path(config) if config else None)
        for name in unknown_variables(os.environ):
            print(f"disagg: no command reads `{name}`: is it misspelt?", file=sys.stderr)  # noqa: T201
        raise typer.Exit(action(settings, **extra))

    annotations = {field: _option(field, info) for field, info in cls.model_fields.items()}
    annotations["config"] = Annotated[
        str | None, typer.Option("--config", help="YAML file with settings", metavar="FILE")
    ]
    annotations |= {name: Annotated[int | None, typer.Option(flag_of(name), hidden=True)] for name in hidden}
    annotations |= {n: Annotated[bool | None, typer.Option(flag_of(n), help=text)] for n, text in switches.items()}
    annotations |= {name: Annotated[str, typer.Argument(help=text)] for name, text in arguments.items()}
    run.__annotations__ = annotations
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=... if n in arguments else None, annotation=a)
            for n, a in annotations.items()
        ]
    )
    return run


def _option(field: str, info: FieldInfo) -> Any:
    """Text is validated by the settings class, whose sentences are the same for flag, variable and file."""
    flag, text = flag_of(field), info.description or ""
    if info.annotation is bool:
        help_text = _help(text, "on" if info.default else "off")
        return Annotated[bool | None, typer.Option(f"{flag}/{off_flag_of(field)}", help=help_text, show_default=False)]
    hidden = info.json_schema_extra == {"hidden": True}
    help_text, metavar = _help(text, info.default), _metavar(info.annotation)
    option = typer.Option(flag, help=help_text, metavar=metavar, hidden=hidden)
    return Annotated[list[str] | None, option] if _is_list(info) else Annotated[str | None, option]


def _is_list(info: FieldInfo) -> bool:
    """Whether the flag may be given several times; then it counts as one list with commas."""
    annotation = info.annotation
    if get_origin(annotation) in {Union, UnionType}:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) is tuple


def _joined(value: Any) -> Any:
    return ",".join(value) if isinstance(value, list) else value


def _help(text: str, default: object) -> str:
    if default in (None, ()) or "[default" in text:
        return text
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} [default: {shown}]"


def _metavar(annotation: Any) -> str:
    """What to write after the flag: INT, SIZE or the choices."""
    if get_origin(annotation) in {Union, UnionType}:
        annotation = get_args(annotation)[0]
    if annotation == Nbytes:
        return "SIZE"
    if annotation == Sizes:
        return "SIZE,..."
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {int: "INT", float: "NUMBER", Path: "FILE"}.get(annotation, "TEXT")
