"""One settings object out of flags, environment and a YAML file, in this order of precedence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import yaml
from pydantic import ValidationError

from disagg.config.errors import ConfigError
from disagg.config.settings import (
    DemoSettings,
    ModelSettings,
    PlanSettings,
    RatesSettings,
    RouterSettings,
    SimulateSettings,
    UpSettings,
    WorkerSettings,
)

PREFIX: Final = "DISAGG_"
SWITCHES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"DISAGG_KERNELS": ("torch", "triton"), "DISAGG_FUSED_QKV": ("on", "off"), "DISAGG_NATIVE": ("on", "off")}
)
"""Variables without a flag and the values they have: `disagg.kernels` reads them where it is imported, in a worker."""

OTHER_VARIABLES: Final = frozenset({"DISAGG_SECRET", "DISAGG_CONFIG", *SWITCHES})

SERVICE_LINK: Final = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)|\w+_PORT=(tcp|udp|sctp)://.*",
    re.ASCII,
)
"""What Kubernetes tells every container about a service called `disagg` or `disagg-...`, as `NAME` or `NAME=value`."""

COMMANDS: Final = (
    *(UpSettings, DemoSettings, RouterSettings, WorkerSettings, PlanSettings),
    *(SimulateSettings, RatesSettings),
)
_KINDS: Final = {"int": "a whole number", "float": "a number", "bool": "true or false"}

S = TypeVar("S", bound=ModelSettings)


def load(cls: type[S], flags: Mapping[str, Any], environ: Mapping[str, str], config: Path | None = None) -> S:
    """Merge and validate. `flags` holds only what was given. Raises ConfigError: one sentence that names the origin."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, describe in (
        (read_yaml(cls, config) if config else {}, f"`{{field}}` in `{config}`"),
        (read_environ(cls, environ), "`{variable}`"),
        (flags, "`{flag}`"),
    ):
        for field, value in source.items():
            values[field] = value
            origins[field] = describe.format(field=field, variable=variable_of(field), flag=flag_of(field))
    try:
        return cls.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(_sentence(cls, exc, values, origins)) from None


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def off_flag_of(field: str) -> str:
    """What a true-or-false setting is switched off with: `--no-x` for `--x`, and `--x` for `--no-x`."""
    name = flag_of(field)[2:]
    return f"--{name[3:]}" if name.startswith("no-") else f"--no-{name}"


def variable_of(field: str) -> str:
    return PREFIX + field.upper()


def read_environ(cls: type[ModelSettings], environ: Mapping[str, str]) -> dict[str, str]:
    """The fields of `cls` that have a non-empty `DISAGG_*` variable, which is not Kubernetes' word on a service."""
    names = {field: variable_of(field) for field in cls.model_fields}
    return {
        field: environ[name]
        for field, name in names.items()
        if environ.get(name) and not is_service_link(name, environ[name])
    }


def check_switches(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a value that no worker would start with."""
    for name, values in SWITCHES.items():
        if (value := environ.get(name)) and value not in values:
            raise ConfigError(f"`{name}` is `{value}`: expected {' or '.join(values)}, or leave it unset")


def is_service_link(name: str, value: str) -> bool:
    return any(SERVICE_LINK.fullmatch(text) for text in (name, f"{name}={value}"))


def to_flags(settings: ModelSettings, *, hide: Iterable[str] = ()) -> list[str]:
    """The command line that gives `settings` again; defaults are left out, and so are the fields in `hide`."""
    flags = []
    for field, info in type(settings).model_fields.items():
        value = getattr(settings, field)
        if field in hide or value is None or (value == info.default and field != "model"):
            continue
        if isinstance(value, bool):
            flags.append(flag_of(field) if value else off_flag_of(field))
        else:
            flags += [flag_of(field), _shown(value)]
    return flags


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """`DISAGG_*` variables that no command reads: most likely misspelt."""
    known = {variable_of(field) for cls in COMMANDS for field in cls.model_fields}
    ours = (name for name, value in environ.items() if name.startswith(PREFIX) and not is_service_link(name, value))
    return sorted(name for name in ours if name not in known | OTHER_VARIABLES)


def read_yaml(cls: type[ModelSettings], path: Path) -> dict[str, Any]:
    """The file's mapping, each key a field of `cls`. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise ConfigError(f"`--config` cannot be read: `{path}`: {(exc.strerror or str(exc)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"`{path}` is not YAML: {' '.join(str(exc).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"`{path}` holds a {type(content).__name__}: expected lines of `key: value`")
    for key in content:
        if key not in cls.model_fields:
            raise ConfigError(
                f"`{key}` in `{path}` is no setting of this command{_nearest(str(key), cls.model_fields)}"
            )
    return {key: value for key, value in content.items() if value is not None}


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean `{matches[0]}`?" if matches else ": see its `--help` for the settings it has"


def _sentence(
    cls: type[ModelSettings], exc: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]
) -> str:
    """The first complaint as `origin` is `value`: what was expected. Whole-model complaints begin with `field: `.

    The value of a key is left out: sentences end in logs.
    """
    error = exc.errors()[0]
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if not error["loc"]:
        field, _, message = message.partition(": ")
        return f"`{flag_of(field)}`: {message}"
    if error["type"].startswith(("int_", "float_", "bool_")):
        message = f"expected {_KINDS[error['type'].partition('_')[0]]}"
    if error["type"].endswith("too_short"):
        message = "expected a value"
    field = str(error["loc"][0])
    if field not in origins:
        return message
    if not cls.model_fields[field].repr:
        return f"{origins[field]}: {message}"
    return f"{origins[field]} is `{_shown(values[field])}`: {message}"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
