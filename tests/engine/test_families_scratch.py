"""Every windowed family through the real runner with scratch slots: the tokens of prefill without them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.model.continuous import Live, greedy, make_cache
from support.model.families import WINDOW, Reference, safe_prompts, save_family

from disagg.cache.layout import CacheLayout
from disagg.cache.scratch import Scratch
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.runner import Runner

BLOCK_SIZE = 8
NUM_TOKENS = 10
LENGTHS = (WINDOW - 1, WINDOW + 1, 4 * BLOCK_SIZE + 1, 3 * WINDOW + 17, 150)
NAMES = ("gemma2", "gemma3", "gemma3n", "gemma4", "gemma4-keqv", "mistral", "qwen3-win", "gpt_oss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


@cache
def load_case(name: str, folder: Path) -> tuple[LoadedModel, tuple[Reference, ...]]:
    model = load_model(save_family(name, folder / name))
    return model, tuple(safe_prompts(model.module, LENGTHS, NUM_TOKENS))


def answers(model: LoadedModel, references: tuple[Reference, ...], chunk: int) -> tuple[list[Live], Runner]:
    runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=160, uses_scratch=True))
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=chunk)
    assert all(pool.num_used == 0 for pool in runner.cache.pools)
    runner.cache.close()
    return lives, runner


def num_equal(lives: list[Live], references: tuple[Reference, ...]) -> int:
    return sum(live.answer == reference.token_ids for live, reference in zip(lives, references, strict=True))


@pytest.mark.parametrize("chunk", [512, 61])
@pytest.mark.parametrize("name", NAMES)
def test_scratch_slots_do_not_change_answers(name: str, chunk: int, folder: Path) -> None:
    model, references = load_case(name, folder)
    lives, _ = answers(model, references, chunk)
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"


def test_families_that_share_kv_have_groups_with_scratch(folder: Path) -> None:
    """The last-writer rule forbids nothing here: readers follow the last layer of their kind that writes."""
    for name in ("gemma3n", "gemma4"):
        layout = make_layout(load_case(name, folder)[0])
        assert any(layer != producer for layer, producer in layout.producers)
        assert [layout.scratch_pages(g) > 0 for g in range(layout.num_groups)] == [
            group.window is not None for group in layout.groups
        ]


def make_layout(model: LoadedModel) -> CacheLayout:
    cache = make_cache(model, block_size=BLOCK_SIZE, num_slots=40, uses_scratch=True)
    cache.close()
    return cache.layout


# --- negative controls ----------------------------------------------------------------------------------------


def test_two_blocks_on_one_page_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, references = load_case("gemma3", folder)
    exact = Scratch.pages
    monkeypatch.setattr(Scratch, "pages", lambda self, n: exact(self, n) // n * n)
    assert num_equal(answers(model, references, 512)[0], references) < len(references)


def test_a_reader_of_an_overwritten_layer_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4 with its last windowed writer made a reader of the first one: the layout must refuse scratch.

    As the models are, only their last layers read others' KV, and no later token depends on what those make of it.
    """
    model, references = load_case("gemma4", folder)
    last = max(layer.producer for layer in model.layers if layer.producer != layer.index and layer.window)
    layers = tuple(replace(x, producer=0) if x.producer == last else x for x in model.layers)
    assert model.layers[0].window
    assert model.layers[1].window
    other = replace(model, layers=layers)
    wrong = greedy_tokens(other, references)
    assert [x.scratch_pages(g) for x in [make_layout(other)] for g in range(2)] == [0, 0]
    assert greedy_tokens(other, references) == wrong
    monkeypatch.setattr(CacheLayout, "scratch_pages", lambda self, g: len(self.groups[g].layers) if g == 0 else 0)
    assert greedy_tokens(other, references) != wrong


def greedy_tokens(model: LoadedModel, references: tuple[Reference, ...]) -> list[tuple[int, ...]]:
    return [live.answer for live in answers(model, references, 512)[0]]
