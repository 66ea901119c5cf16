"""Where the bundled model lies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

from disagg.config.errors import ConfigError

DEMO_MODEL: Final = "demo"
"""What `--model` says to mean the bundled model, and the name it is served under."""


def demo_model_folder() -> Path:
    """The bundled model's folder. Raises ConfigError where the package was installed without it."""
    folder = Path(str(files("disagg") / "demo_model"))
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"this installation has no bundled model at `{folder}`: give a folder or a hub id with `--model`"
        )
    return folder


def is_demo_model(model: str) -> bool:
    return Path(model) == Path(str(files("disagg") / "demo_model"))
