"""`disagg`, as a worker that says its blocks have 12 tokens: a number that `--block-size` refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from disagg.cli.main import main
from disagg.worker import parts

BLOCK_SIZE = 12

plain: Any = parts.EngineParts.geometry


def geometry(self: parts.EngineParts) -> Any:
    return replace(plain.fget(self), block_size=BLOCK_SIZE)


if __name__ == "__main__":
    parts.EngineParts.geometry = property(geometry)  # type: ignore[method-assign, assignment]
    sys.exit(main(sys.argv[1:]))
