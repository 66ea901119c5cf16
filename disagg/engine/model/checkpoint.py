"""A model folder as the hub ships it, read without torch or transformers: its place, fingerprint and defaults."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from disagg.engine.model.weights import ModelRefused, TensorEntry, read_config, read_json, read_tensors, weight_files

__all__ = ["GenerationDefaults", "ModelRefused", "fingerprint", "generation_defaults", "resolve_model"]

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# Written by whichever tool saved the folder last; they do not change what the model computes.
VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
SAMPLE_NBYTES = 4096  # per sample: one page, so a tensor costs three page reads
CHUNK_NBYTES = 1 << 22  # per read of `verify_weights`: large enough that reads cost nothing beside hashing
# owner/name; a bare word that is no folder is a missing folder.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_ID = 2**31 - 1  # of tokens, and of counts of them: what 32 bits of every kernel hold
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")


# --- where it is --------------------------------------------------------------------------------------------


def resolve_model(name: str, *, needs_weights: bool = True) -> Path:
    """The folder that `name` names: a path, or a hub id, downloaded or found in the hub's cache.

    Hub ids honour HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Without `needs_weights` config.json is enough, and all that is
    downloaded.
    Raises ModelRefused when there is no such folder or model, or the folder holds no config or no safetensors.
    """
    try:
        folder, is_folder = _find_folder(name)
    except (OSError, ValueError, RuntimeError) as exc:  # no permission, too long a name, an unknown `~user`
        raise ModelRefused(f"model `{name}` cannot be looked up: {exc}") from exc
    if not is_folder:
        if folder.exists():
            raise ModelRefused(f"model `{name}` is a file, expected a folder with config.json and safetensors files")
        if not HUB_ID.fullmatch(name):
            raise ModelRefused(f"model folder `{name}` does not exist; give a folder with config.json or a hub id")
        folder = _download(name, HUB_FILES if needs_weights else ("config.json",))
    read_config(folder)
    if needs_weights:
        weight_files(folder)
    return folder


def _find_folder(name: str) -> tuple[Path, bool]:
    """The path that `name` may be, and whether a folder is there that can be read."""
    folder = Path(name).expanduser()
    is_folder = folder.is_dir()
    if is_folder:
        next(folder.iterdir(), None)
    return folder, is_folder


def _download(name: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub  # only a hub id needs it, and it takes a while to import
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    token = huggingface_hub.get_token() or ""  # without white space around it
    if not (token.isascii() and token.isprintable()):
        raise ModelRefused("HF_TOKEN has characters that no HTTP header can carry: copy the token again from the hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except GatedRepoError as exc:
        raise ModelRefused(f"model `{name}` is gated: accept its licence on the hub and set HF_TOKEN") from exc
    except RepositoryNotFoundError as exc:
        raise ModelRefused(
            f"model `{name}` is neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from exc
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as exc:
        raise ModelRefused(
            f"model `{name}` is no folder here, is not in the hub's cache, and the hub cannot be reached; give a folder"
        ) from exc


# --- fingerprint -------------------------------------------------------------------------------------------


def fingerprint(folder: Path, *, verify_weights: bool = False) -> str:
    """blake2b-128 (hex) of config, tokenizer files and weights: equal fingerprints, equal models.

    Of each tensor its name, dtype, shape and three 4 KiB samples count, with `verify_weights` all its bytes. How the
    tensors are spread over shards does not. Raises ModelRefused.
    """
    state = blake2b(digest_size=16)
    _update(state, b"config", _canonical(read_config(folder)))
    files: dict[Path, IO[bytes]] = {}
    try:
        for name in TOKENIZER_FILES:
            path = folder / name
            if path.is_file():
                _update(state, name.encode(), path.read_bytes())
        for entry in read_tensors(folder):
            file = files.get(entry.path) or files.setdefault(entry.path, entry.path.open("rb"))
            head = json.dumps([entry.name, entry.dtype, entry.shape]).encode()
            _update(state, head, _content(file, entry, verify_weights))
    except OSError as exc:
        raise ModelRefused(f"the files in `{folder}` cannot be read: {exc}") from exc
    finally:
        for file in files.values():
            file.close()
    return state.hexdigest()


def _canonical(config: dict[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _update(state: blake2b, name: bytes, data: bytes) -> None:
    for part in (name, data):  # lengths first, so that no two sequences of parts run together alike
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)


def _content(file: IO[bytes], entry: TensorEntry, whole: bool) -> bytes:
    """What counts of a tensor's bytes: first, middle and last sample, or a digest of all."""
    if whole:
        return _digest_all(file, entry)
    size = min(SAMPLE_NBYTES, entry.nbytes)
    starts = (entry.start, entry.start + (entry.nbytes - size) // 2, entry.end - size)
    return b"".join(os.pread(file.fileno(), size, start) for start in starts)


def _digest_all(file: IO[bytes], entry: TensorEntry) -> bytes:
    state = blake2b(digest_size=16)
    for start in range(entry.start, entry.end, CHUNK_NBYTES):
        state.update(os.pread(file.fileno(), min(CHUNK_NBYTES, entry.end - start), start))
    return state.digest()


# --- how it likes to be sampled -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets that does not say otherwise, as vLLM takes it from generation_config.json.

    `max_tokens` None = up to the model's length. `bos_token_id` None = the model has none.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    bos_token_id: int | None = None


# generation_config.json's name -> ours; `do_sample` is ignored there too: a temperature is honoured without it.
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(folder: Path) -> GenerationDefaults:
    """eos ids of generation_config.json (or else config.json) and of the tokenizer; sampling defaults. ModelRefused."""
    generation = read_json(folder, "generation_config.json") or {}
    config = read_config(folder)
    text = config.get("text_config")
    sources = [generation, config, text if isinstance(text, dict) else {}]
    eos = next((ids for ids in (_ids(source.get("eos_token_id")) for source in sources) if ids), ())
    bos = next((ids[0] for ids in (_ids(source.get("bos_token_id")) for source in sources) if ids), None)
    own = _tokenizer_eos(folder)
    given = {ours: generation[key] for key, ours in SAMPLING_KEYS.items() if generation.get(key) is not None}
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()):
        raise ModelRefused(f"`{folder / 'generation_config.json'}` has a sampling default that is no number: {given}")
    for key, least in (("top_k", -1), ("max_new_tokens", 1)):  # a top_k of -1 is a spelling of "off"
        if (ours := SAMPLING_KEYS[key]) in given:
            given[ours] = max(0, _whole(given[ours], key, least))
    return GenerationDefaults(eos_token_ids=tuple(dict.fromkeys([*eos, *own])), bos_token_id=bos, **given)


def _whole(value: float, key: str, least: int) -> int:
    """The value of a default that counts tokens. Raises ModelRefused."""
    if not (least <= value <= MAX_ID and value == int(value)):
        raise ModelRefused(f"generation_config.json: `{key}` is {value}, expected a whole number of at least {least}")
    return int(value)


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_ID)


def _tokenizer_eos(folder: Path) -> tuple[int, ...]:
    """The id of the tokenizer's own eos token, if its files say both the token and its id.

    Other shapes than a list of objects say nothing; whether they are a tokenizer's is not decided here.
    """
    eos = (read_json(folder, "tokenizer_config.json") or {}).get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    added = (read_json(folder, "tokenizer.json") or {}).get("added_tokens")
    matching = (
        token
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and token.get("content") == content
    )
    return tuple(i for token in matching for i in _ids(token.get("id")))
