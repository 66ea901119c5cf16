"""The public keys of those that may subscribe to cached blocks: `--kv-events-keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from zmq.utils import z85

from disagg.config.errors import ConfigError

MAX_FILE_NBYTES: Final = 1 << 20
"""Twenty thousand keys: a wrong path may be a device without end."""
KEY_CHARS: Final = 40
"""Of a CURVE key in Z85."""


def read_event_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file with one a line; what follows a `#` is a comment. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_FILE_NBYTES).splitlines()
    except OSError as exc:
        raise ConfigError(
            f"`--kv-events-keys` cannot be read: `{path}`: {(exc.strerror or str(exc)).lower()}"
        ) from None
    keys = [_key(path, number, line) for number, line in enumerate(lines, 1) if _text(line)]
    if not keys:
        raise ConfigError(f"`--kv-events-keys`: `{path}` has no key; expected one CURVE public key (Z85) a line")
    return tuple(keys)


def _text(line: bytes) -> bytes:
    """A line may begin with `#`, or have one behind a blank: within a key it is a digit."""
    return b"" if line.startswith(b"#") else line.split(b" #")[0].strip()


def _key(path: Path, number: int, line: bytes) -> bytes:
    key = _text(line)
    try:
        is_key = len(key) == KEY_CHARS and len(z85.decode(key)) == 32
    except (KeyError, ValueError):
        is_key = False
    if not is_key:
        raise ConfigError(
            f"`--kv-events-keys`: line {number} of `{path}` has {len(key)} characters that are no key; expected a "
            f"CURVE public key of {KEY_CHARS} characters (Z85), as zmq.curve_keypair() makes"
        )
    return key
