"""Decode graphs and the fused step as a GPU runs them: tokens of eager steps and of a CPU, counts, the time saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.model.continuous import greedy, make_cache
from support.model.families import FAMILIES
from support.model.graphed import LENGTHS, MAX_MODEL_LEN, load_case
from support.tools import load_script

from disagg.cache.cache import KVCache
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.graphs.cuda import CudaGraphs
from disagg.engine.run.graphs.decode import DecodeGraphs, GraphRunner
from disagg.engine.run.pieces.runner import PiecewiseRunner
from disagg.engine.run.runner import Runner
from disagg.kernels.dispatch import CALLS, FUSED_VARIABLE

pytestmark = pytest.mark.gpu
NUM_TOKENS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: tokens are compared with a CPU's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def answers(model: LoadedModel, prompts: list[tuple[int, ...]], *, graphs: bool) -> list[tuple[int, ...]]:
    plain = make_cache(model, block_size=8, num_slots=120)
    cache = KVCache(plain.layout, [pool.num_slots for pool in plain.pools], "cuda")
    runner = eager = Runner(model, cache)
    if graphs:
        captured = DecodeGraphs(
            model, cache, CudaGraphs(model.device), max_num_seqs=len(LENGTHS), max_model_len=MAX_MODEL_LEN
        )
        captured.capture()
        assert captured.use.num_captured == 3
        runner = GraphRunner(eager, captured)  # type: ignore[assignment]
        runner.cache = cache
    CALLS.clear()
    lives = greedy(runner, prompts, NUM_TOKENS, chunk=61)
    assert (CALLS["graph:decode"] > 9) == graphs
    assert not [name for name in CALLS if name.startswith("torch:")]
    return [live.answer for live in lives]


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_answer_as_eager_steps_and_as_a_cpu(name: str, folder: Path) -> None:
    _, references = load_case(name, folder, NUM_TOKENS)
    model = load_model(folder / name, device="cuda")
    prompts = [reference.prompt for reference in references]
    eager = answers(model, prompts, graphs=False)
    assert CALLS["kernel:preprocess_qkv"] > 0
    assert eager == [reference.token_ids for reference in references]
    assert answers(model, prompts, graphs=True) == eager


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_step_answers_as_transformers_forward(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, references = load_case(name, folder, NUM_TOKENS)
    prompts = [reference.prompt for reference in references]
    found = []
    for value in ("on", "off"):
        monkeypatch.setenv(FUSED_VARIABLE, value)
        found.append(answers(load_model(folder / name, device="cuda"), prompts, graphs=False))
        assert (CALLS["kernel:preprocess_qkv"] > 0) == (value == "on")
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gemma4"])
def test_pieces_answer_as_a_cpu(name: str, folder: Path) -> None:
    _, references = load_case(name, folder, NUM_TOKENS)
    model = load_model(folder / name, device="cuda")
    plain = make_cache(model, block_size=8, num_slots=120)
    cache = KVCache(plain.layout, [pool.num_slots for pool in plain.pools], "cuda")
    runner = PiecewiseRunner(model, cache, CudaGraphs(model.device), max_num_batched_tokens=64, max_rows=4)
    runner.capture()
    CALLS.clear()
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    assert CALLS["graph:piecewise"] > NUM_TOKENS
    assert not [name for name in CALLS if name.startswith("torch:")]
    assert [live.answer for live in lives] == [reference.token_ids for reference in references]


@pytest.fixture(scope="module")
def decode_step() -> ModuleType:
    return load_script("benchmarks/decode_step.py")


def test_a_step_of_a_small_model_takes_a_third_of_the_eager_one(decode_step: ModuleType) -> None:
    _, eager, graphs = decode_step.contenders("cuda")
    chunks = [way.chunks(8, 1, decode_step.HISTORY) for way in (eager, graphs)]
    for _ in range(10):
        eager.seconds(chunks[0]), graphs.seconds(chunks[1])
    times = [(eager.seconds(chunks[0]), graphs.seconds(chunks[1])) for _ in range(50)]
    assert CALLS["graph:decode"] >= 60
    assert sorted(a / b for a, b in times)[25] >= 3.0
