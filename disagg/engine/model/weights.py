"""The files of a model folder: config.json, and safetensors headers, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
# safetensors' own limit; a longer header is a damaged or hostile file.
MAX_HEADER_NBYTES = 100_000_000


class ModelRefused(ValueError):
    """The model cannot be served; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file. `start`, `end`: byte offsets in `path`. `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises ModelRefused when it is missing or is no JSON object."""
    config = read_json(folder, "config.json")
    if config is None:
        raise ModelRefused(f"model folder `{folder}` has no config.json; give a folder as the hub ships it")
    return config


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in `folder / name`, None when there is no such file. Raises ModelRefused."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelRefused(f"`{folder / name}` cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelRefused(f"`{folder / name}` holds no JSON object")
    return value


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the model: the index's shards, or the one file. Raises ModelRefused."""
    index = read_json(folder, INDEX_NAME)
    if index is None:
        names = [WEIGHTS_NAME]
    else:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
            raise ModelRefused(f"`{folder / INDEX_NAME}` has no usable weight_map; fetch the model again")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ModelRefused(f"model folder `{folder}` lacks {name}; only safetensors checkpoints are served")
    return tuple(folder / name for name in names)


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def read_tensors(folder: Path) -> tuple[TensorEntry, ...]:
    """Every tensor of the model by name, from the files' headers alone, so in the same order however it is sharded."""
    entries = [entry for path in weight_files(folder) for entry in _read_header(path)]
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _read_header(path: Path) -> list[TensorEntry]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_NBYTES, path.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        end = path.stat().st_size
        return [
            _entry(name, fields, path, 8 + length, end) for name, fields in header.items() if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ModelRefused(f"`{path}` is no whole safetensors file ({exc}); fetch it again") from exc


def _entry(name: str, fields: dict[str, Any], path: Path, base: int, file_end: int) -> TensorEntry:
    first, last = fields["data_offsets"]
    if not 0 <= first <= last <= file_end - base:
        raise ValueError(f"tensor {name} lies outside the file")
    return TensorEntry(name, str(fields["dtype"]), tuple(fields["shape"]), path, base + first, base + last)
