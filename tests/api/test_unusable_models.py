"""A model folder that cannot be served is one sentence: from each of its files, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.model.checkpoints import edit_json
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.request.sampling import check_defaults
from disagg.api.text.template import find_template
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.cli.main import main
from disagg.engine.model.checkpoint import fingerprint, generation_defaults, resolve_model
from disagg.engine.model.load import read_skeleton
from disagg.engine.model.weights import ModelRefused

Edit = Callable[[Path], object]
READERS: dict[str, Callable[[Path], object]] = {
    "folder": lambda folder: resolve_model(str(folder)),
    "fingerprint": fingerprint,
    "defaults": lambda folder: check_defaults(generation_defaults(folder)),
    "tokenizer": ModelTokenizer.load,
    "skeleton": read_skeleton,
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)
FILES_OF_THE_SKELETON = {"config.json", "model.safetensors", "model.safetensors.index.json"}
"""It takes ten times as long as the other readers together, so it is left out where another file is changed."""
CONTENTS = {
    "nothing": b"",
    "no JSON": b"x",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "an empty object": b"{}",
    "no UTF-8": b"\xff\xfe\x00",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "lists in lists": b"[" * 100_000,
}
TEXTS = (None, "x", "")
NUMBERS = (-1, 0, 1.5, True, 2**70, float("inf"), float("nan"))
VALUES: tuple[Any, ...] = (*TEXTS, *NUMBERS, [], {}, [None], [{}], {"a": 1})
KEYS = {
    "generation_config.json": (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens",
        "eos_token_id", "bos_token_id",
    ),
    "tokenizer_config.json": ("bos_token", "eos_token", "unk_token", "add_bos_token", "chat_template"),
    "tokenizer.json": ("added_tokens", "model", "decoder", "post_processor", "normalizer"),
    "config.json": ("architectures", "text_config", "vocab_size", "quantization_config", "eos_token_id"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))


def refusals(folder: Path, changed: str = "config.json") -> dict[str, str]:
    """What each reader of this file says; an error of any other kind fails the test."""
    said = {}
    for name, read in READERS.items():
        if name == "skeleton" and changed not in FILES_OF_THE_SKELETON:
            continue
        try:
            read(folder)
        except ModelRefused as refusal:
            said[name] = str(refusal)
    return said


def test_the_bundled_model_is_refused_by_no_reader(folder: Path) -> None:
    assert refusals(folder) == {}


def test_a_skeleton_is_read_from_its_own_files(folder: Path) -> None:
    """The others are found by name at most."""
    opened: set[str] | None = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and opened is not None:
            opened.add(str(arguments[0]))

    sys.addaudithook(note)  # which stays for good
    read_skeleton(folder)
    names = {Path(name).name for name in opened if name.startswith(str(folder))}
    opened = None
    assert "config.json" in names
    assert names <= FILES_OF_THE_SKELETON


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_holds_is_served_or_refused(name: str, content: str, folder: Path) -> None:
    (folder / name).write_bytes(CONTENTS[content])
    said = refusals(folder, name)
    if name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert said, "no reader noticed"


@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_a_files_place_is_served_or_refused(name: str, folder: Path) -> None:
    for make in (Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("nowhere")):
        path = folder / name
        path.unlink(missing_ok=True)
        make(path)
        refusals(folder, name)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_whatever_a_key_holds_is_served_or_refused(name: str, key: str, folder: Path) -> None:
    before = (folder / name).read_text()
    if key == "chat_template":
        (folder / "chat_template.jinja").unlink()
    for value in VALUES:
        (folder / name).write_text(json.dumps({**json.loads(before), key: value}))
        refusals(folder, name)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("temperature", "0.7", "a sampling default that is no number"),
        ("temperature", -1, "not usable"),
        ("top_p", 0.0, "not usable"),
        ("top_k", 1.5, "`top_k` is 1.5, expected a whole number of at least -1"),
        ("top_k", float("inf"), "`top_k` is inf, expected a whole number"),
        ("max_new_tokens", 0, "`max_new_tokens` is 0, expected a whole number of at least 1"),
        ("max_new_tokens", float("nan"), "`max_new_tokens` is nan"),
    ],
)
def test_a_sampling_default_that_no_request_could_use_is_refused(
    key: str, value: object, words: str, folder: Path
) -> None:
    edit_json(folder / "generation_config.json", **{key: value})
    assert words in refusals(folder, "generation_config.json")["defaults"]


def test_ids_that_are_none_end_no_text(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[-1, 2**70, True, 3])
    assert 3 in generation_defaults(folder).eos_token_ids
    assert max(generation_defaults(folder).eos_token_ids) < 2**31
    assert min(generation_defaults(folder).eos_token_ids) >= 0


TEMPLATES = {
    "a syntax error": "{% for m in messages %}{{ m.content }",
    "an unknown filter": "{{ x | nofilter }}",
    "an unknown tag": "{% nosuch %}",
    "break outside of a loop": "{% break %}",
    "parentheses without end": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "another file": "{% include 'x' %}",
    "another file's macros": "{% import 'x' as y %}",
    "a parent": "{% extends 'x' %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_can_never_be_rendered_is_refused(case: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[case])
    assert "the model's chat template" in refusals(folder, "chat_template.jinja")["tokenizer"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_template_in_another_encoding_is_refused(encoding: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes("é{{ messages }}".encode(encoding))
    assert "cannot be read as UTF-8 text" in refusals(folder, "chat_template.jinja")["tokenizer"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes("{{ messages }}".encode("utf-8-sig"))
    assert find_template(folder, {}) == "{{ messages }}"


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "~no-such-user/model", "/dev/null", "\udcff"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(ModelRefused):
        resolve_model(name)


def test_a_folder_that_may_not_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every folder may be read, so the system's word is put in."""

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("is_dir", "iterdir"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            with pytest.raises(ModelRefused, match=r"cannot be looked up: .*Permission denied"):
                resolve_model(str(folder))


EDITS: dict[str, Edit] = {
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "a tokenizer that is none": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "a template with a syntax error": lambda folder: (folder / "chat_template.jinja").write_text("{% for"),
    "a default that is text": lambda folder: edit_json(folder / "generation_config.json", temperature="0.7"),
    "a default out of range": lambda folder: edit_json(folder / "generation_config.json", top_p=0.0),
    "a config that is none": lambda folder: (folder / "config.json").write_text("x"),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("case", EDITS)
def test_the_router_ends_with_one_sentence_and_exit_code_2(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is raised after its socket is open arrives in an ExceptionGroup."""
    EDITS[case](folder)
    ports = ("--port", "0", "--admin-port", "0", "--control-port", "0")
    assert main(["router", "--insecure", "--model", str(folder), *ports]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("disagg: ")


def test_an_error_that_no_reader_foresaw_is_the_folders_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr("disagg.api.main.open_app", fail)
    ports = ("--port", "0", "--admin-port", "0", "--control-port", "0")
    assert main(["router", "--insecure", "--model", str(folder), *ports]) == 2
    assert "cannot be used: ZeroDivisionError: of a library" in capsys.readouterr().err


def test_a_hub_token_that_no_header_can_carry_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_tökén\n")
    with pytest.raises(ModelRefused, match="HF_TOKEN has characters that no HTTP header can carry") as caught:
        resolve_model("some/model")
    assert "hf_" not in str(caught.value)
