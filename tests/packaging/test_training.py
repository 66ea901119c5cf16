"""The script that trains a demo model, and what it takes for prose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.tools import load_tool
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "disagg" / "demo_model"


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    return load_tool("prose")


SENTENCE = "The file is opened for reading and its content is returned as text."


def test_markdown_prose_loses_its_markup_and_code(prose: ModuleType) -> None:
    paragraph = "The `file` is [opened](x.md) for reading and its\ncontent is returned as *text*."
    text = f"# A heading\n\n{paragraph}\n\n```\n{SENTENCE}\n```\n"
    assert list(prose.plain_paragraphs(text)) == [SENTENCE]


def test_docstrings_are_read_without_their_examples(prose: ModuleType) -> None:
    source = f'def f():\n    """{SENTENCE}\n\n    >>> f()\n    """\n    # {SENTENCE}\n'
    assert list(prose.docstring_paragraphs(source)) == [SENTENCE]


def test_source_that_does_not_parse_gives_nothing(prose: ModuleType) -> None:
    assert list(prose.docstring_paragraphs("def {{ name }}():")) == []


def test_html_paragraphs_are_read_across_inner_elements(prose: ModuleType) -> None:
    html = (
        f"<h1>{SENTENCE}</h1><p>The <code>file</code> is opened for reading\nand its content is returned as text.</p>"
    )
    assert list(prose.html_paragraphs(html)) == [SENTENCE]


@pytest.mark.parametrize(
    "text",
    ["Short.", "x = [1, 2, 3]; y = {4: 5}; z = (6, 7, 8); w = x + [y[4], z[0]].", "Ümlaut " + SENTENCE, SENTENCE[:-1]],
)
def test_what_is_not_a_plain_sentence_is_left_out(prose: ModuleType, text: str) -> None:
    assert not prose.is_prose(text)


def test_a_paragraph_counts_once_in_all_documents(prose: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{SENTENCE}\n\n{SENTENCE}\n")
    (tmp_path / "b.md").write_text(f"{SENTENCE}\n\nAnother paragraph stands only here, and it is long enough.\n")
    (tmp_path / "c.bin").write_text(SENTENCE)
    assert prose.gather([tmp_path]) == [SENTENCE, "Another paragraph stands only here, and it is long enough."]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The script's `main`, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return load_tool("train_demo_model").main


def test_text_without_prose_is_refused_in_one_sentence(
    train: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("nothing")
    assert train([str(tmp_path / "out"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no prose in")
    assert error.count("\n") == 1


def test_a_few_steps_make_a_folder_like_the_shipped_one(train: Callable[[list[str]], int], tmp_path: Path) -> None:
    """Three steps teach nothing; the folder, its config and its tokenizer are what a real run writes."""
    text = Path(json.__file__).parents[1]
    sources = [str(text / name) for name in ("argparse.py", "json", "email", "logging", "asyncio")]
    options = ["--steps", "3", "--sequence-length", "96", "--batch-size", "2", "--vocab-size", "400"]
    assert train([str(tmp_path), *sources, *options]) == 0

    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in SHIPPED.iterdir()} - {"NOTICE", "README.md"}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, SHIPPED))
        assert {**ours, "vocab_size": 0, "transformers_version": ""} == {
            **theirs,
            "vocab_size": 0,
            "transformers_version": "",
        }

    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode("Any 日本語 text.", add_special_tokens=False)) == "Any 日本語 text."
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    assert model(torch.tensor([tokenizer.encode("The file")])).logits.isfinite().all()
