"""A compiled model answers as transformers does, from one compilation; without a compiler it answers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.model.continuous import greedy, largest_error, make_cache
from support.model.graphed import load_case, num_equal

from disagg.engine.model import opaque_attention
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.compiled import CompiledRunner
from disagg.engine.run.warmup import warm_up
from disagg.kernels.dispatch import CALLS

NUM_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def make_runner(model: LoadedModel, *, uses_scratch: bool = False) -> CompiledRunner:
    return CompiledRunner(model, make_cache(model, block_size=8, num_slots=120, uses_scratch=uses_scratch))


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler's own time
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own too
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gemma4"])
def test_compiled_steps_answer_as_transformers_does(name: str, folder: Path) -> None:
    model, references = load_case(name, folder, NUM_TOKENS)
    runner = make_runner(model, uses_scratch=True)
    warm_up(runner, runner.cache, 128)
    assert runner._compiled is not None
    num_compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    CALLS.clear()
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < 2e-3
    assert CALLS["compiled:forward"] > NUM_TOKENS
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_compiled, "a request waited for a compiler"
    torch._dynamo.reset()


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    exact = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: exact(function, backend=backend, **options))


def test_what_is_compiled_is_the_model_around_our_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that changes nothing, in a second instead of a minute."""
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    seen: list[torch.fx.GraphModule] = []

    def note(traced: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(traced)
        return traced.forward

    with_backend(monkeypatch, note)
    runner = make_runner(model)
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    assert num_equal(lives, references) == len(references)
    assert len(seen) == 1, "one compilation serves steps of every size"
    ours = [n for n in seen[0].graph.nodes if n.target is torch.ops.disagg.attend_now.default]
    assert len(ours) == len(model.layers)
    torch._dynamo.reset()


def test_a_model_that_cannot_be_compiled_is_served_and_the_log_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    with_backend(monkeypatch, refuse)
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    runner = make_runner(model)
    CALLS.clear()
    lives = greedy(runner, [references[0].prompt], NUM_TOKENS, chunk=37)
    assert lives[0].answer == references[0].token_ids
    assert CALLS["compiled:forward"] == 0
    assert CALLS["packed_linear"] > 0
    told = [record.getMessage() for record in caplog.records if "--torch-compile" in record.getMessage()]
    assert len(told) == 1
    assert "no C++ compiler here" in told[0]
    load_case.cache_clear()  # its layers were packed
    torch._dynamo.reset()


def test_attention_that_takes_padding_for_tokens_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    with_backend(monkeypatch, "eager")
    exact = opaque_attention.paged_attention
    monkeypatch.setattr(opaque_attention, "paged_attention", lambda m, q, *rest, **o: exact(m, q.flip(2), *rest, **o))
    lives = greedy(make_runner(model), [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    assert num_equal(lives, references) < len(references)
    torch._dynamo.reset()
