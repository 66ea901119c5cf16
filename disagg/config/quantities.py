"""Values as people write them: memory sizes, comma lists, endpoints."""

from __future__ import annotations

import re
from typing import Final

UNITS: Final = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_nbytes(value: object) -> object:
    """`512MiB`, `2GiB`, `1.5gb` or a plain count of bytes. Anything that is not text passes through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError("expected bytes such as `512MiB`, `2GiB` or `536870912`")
    return int(float(match[1]) * UNITS[match[2].lower()]) if match[2] else int(float(match[1]))


def format_nbytes(nbytes: int) -> str:
    """Binary units for people: three significant digits, all four of 1000 to 1023; what rounds to 1024 is 1 of the
    next unit."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(value) < 1024:
            return f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def _three_digits(value: float) -> str:
    """`9.77`, `97.7`, `977`, `1023`: never in powers of ten."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def split_list(value: object) -> object:
    """`shm,zmq` -> ("shm", "zmq"). Anything that is not text passes through."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def power_of_two(value: int) -> int:
    """`value` as it is. Raises ValueError."""
    if value & (value - 1):
        raise ValueError("expected a power of two, such as 16 or 32")
    return value


def group_tokens(value: tuple[str, ...]) -> tuple[str, ...]:
    """`full=512`, `window-64=48`, as they are. Raises ValueError."""
    if not all(re.fullmatch(r"[^=]+=\d+", entry) for entry in value):
        raise ValueError("expected GROUP=TOKENS such as `full=512`")
    return value


def yaml_switch(value: object) -> object:
    """YAML reads a bare `on` as true and `off` as false; this turns them back."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def tcp_endpoint(value: object) -> object:
    """`10.0.0.1:8998` or `tcp://10.0.0.1:8998` -> the latter."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:tcp://)?(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d{1,5})", value.strip())
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ValueError("expected the router's control endpoint as `tcp://HOST:PORT`")
    return f"tcp://{match[1]}:{match[2]}"


def event_endpoint(value: object) -> object:
    """As `tcp_endpoint`, to listen at: port 0 takes a free one."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:tcp://)?(\[[0-9a-fA-F:]+\]|[^\s:/*]+):(\d{1,5})", value.strip())
    if match is None or int(match[2]) >= 1 << 16:
        raise ValueError("expected where to publish as `tcp://HOST:PORT`")
    return f"tcp://{match[1]}:{match[2]}"


def device(value: str) -> str:
    """`cpu`, `cuda` or `cuda:N`. Raises ValueError."""
    if re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", value) is None:
        raise ValueError("expected `cpu`, `cuda` or `cuda:N`")
    return value


def plain_name(value: str) -> str:
    """A name that needs no quoting in logs, metrics and URLs. Raises ValueError."""
    if re.fullmatch(r"[\w.-]{1,128}", value, re.ASCII) is None:
        raise ValueError("expected at most 128 letters, digits, `.`, `_` and `-`")
    return value


def header_key(value: str) -> str:
    """A key without the white space around it, which files and Kubernetes secrets end with. Raises ValueError.

    What is left must be such that clients can send it: a header holds Latin-1 and no control characters.
    """
    key = value.strip()
    if not key:
        raise ValueError("it holds nothing but white space: give a key, or leave the setting out")
    if not key.isprintable() or max(key) > "\xff":
        raise ValueError("it has characters that no HTTP header can carry: expected printable ASCII or Latin-1")
    return key


def one_line(value: str) -> str:
    """Text for JSON and logs, without white space around it. Raises ValueError."""
    text = value.strip()
    if not text or not text.isprintable():
        raise ValueError("expected a line of printable text")
    return text


def endpoint_host(endpoint: str) -> str:
    """`tcp://[::1]:8998` -> `::1`."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than `localhost` are not resolved."""
    return host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
