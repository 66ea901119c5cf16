"""The API keys of a server: one from `--api-key`, or several with a tenant's name and limits each from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from disagg.config.errors import ConfigError
from disagg.config.private_file import read_private_file
from disagg.config.quantities import header_key

MAX_KEYS: Final = 256
"""The router looks at each tenant that waits to choose the next request: so many cost some 10 microseconds."""
MAX_FILE_NBYTES: Final = 1 << 20
"""Of a key file: 4 KiB a line; a wrong path may be a device without end."""
ONLY_TENANT: Final = "default"
"""The tenant of `--api-key`."""

_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {"weight": float, "max_requests": int, "max_tokens": int}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """`weight`: its share where tenants wait for one another. `max_requests`, `max_tokens`: most in flight at once."""

    tenant: str
    key: str = field(repr=False)
    weight: float = 1.0
    max_requests: int | None = None
    max_tokens: int | None = None


def api_keys(only: str | None, path: Path | None) -> tuple[ApiKey, ...]:
    """All keys; none leaves the API open. Raises ConfigError for a file that cannot be used."""
    keys = [] if only is None else [ApiKey(tenant=ONLY_TENANT, key=only)]
    return (*keys, *(read_key_file(path) if path is not None else ()))


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """Lines of `TENANT KEY [weight=N] [max_requests=N] [max_tokens=N]`; blank ones and `#` comments are skipped.

    Raises ConfigError with the file and the line; keys are never in its sentences.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if (words := line.split()) and not words[0].startswith("#"):
            try:
                keys.append(_parse(words))
            except ValueError as exc:
                raise ConfigError(f"`{path}`, line {number}: {exc}") from None
    if not keys:
        raise ConfigError(f"`{path}` holds no key: expected lines of `TENANT KEY`")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"`{path}` holds {len(keys)} keys: expected {MAX_KEYS} at most")
    for name in ("tenant", "key"):
        if len({getattr(key, name) for key in keys}) < len(keys):
            raise ConfigError(f"`{path}` has a {name} twice: expected one line for each")
    return tuple(keys)


def _text_of(path: Path) -> str:
    try:
        return read_private_file(path, "--api-key-file", MAX_FILE_NBYTES).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"`{path}` is not UTF-8 text: expected lines of `TENANT KEY`") from None


def _parse(words: list[str]) -> ApiKey:
    if len(words) < 2:
        raise ValueError("expected `TENANT KEY`, then options such as `max_requests=8`")
    tenant, key, *options = words
    if not (tenant.isascii() and tenant.isprintable() and len(tenant) <= 64):
        raise ValueError("the tenant's name: expected at most 64 printable ASCII characters")
    values: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OPTIONS:
            raise ValueError(f"`{name}` is no option: expected {', '.join(_OPTIONS)}")
        values[name] = _number(name, value)
    return ApiKey(tenant=tenant, key=header_key(key), **values)


def _number(name: str, value: str) -> float:
    try:
        number = _OPTIONS[name](value)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise ValueError(f"`{name}={value}`: expected a number above 0")
    return number  # type: ignore[no-any-return]
