"""Scripts of the repository, imported: they are no package, because they are run by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    """`tools/NAME.py`; a new copy of the module at each call."""
    return load_script(f"tools/{name}.py")


def load_script(path: str) -> ModuleType:
    """The script at `path` below the repository's root; a new copy of the module at each call."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
