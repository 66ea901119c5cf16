"""What steps take of a device, planned on the meta device, beside what the code that takes it really allocates."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.model.continuous import make_cache
from support.model.families import save_family
from support.model.interpreter import missing_interpreter
from torch.utils._python_dispatch import _disable_current_modes

from disagg.cache.layout import CacheLayout, derive_layout
from disagg.engine.model.hf import transformers as hf
from disagg.engine.model.load import Skeleton, load_model, read_skeleton
from disagg.engine.run.live_bytes import LiveBytes
from disagg.engine.run.runner import Chunk, Runner
from disagg.engine.sampling.rows import SampleRow
from disagg.engine.step_memory import SAMPLER_NBYTES, StepLimits, StepMemory, plan_step_memory
from disagg.kernels.decode_plan import DecodePlan
from disagg.kernels.dispatch import forced
from disagg.kernels.workspace import Workspace

CPU = torch.device("cpu")
MAX_MODEL_LEN = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def limits(num_tokens: int = 64, *, captures: bool = True, pieces: bool = True, rows: int = 4) -> StepLimits:
    return StepLimits(rows, num_tokens, MAX_MODEL_LEN, captures, pieces)


def with_splits(asked: StepLimits) -> StepLimits:
    """For sequences so long that attention over them is split."""
    return replace(asked, max_model_len=8 * MAX_MODEL_LEN)


def planned(skeleton: Skeleton, asked: StepLimits) -> StepMemory:
    return plan_step_memory(skeleton, layout_of(skeleton), "float32", asked, CPU)


def layout_of(skeleton: Skeleton) -> CacheLayout:
    return derive_layout(skeleton.layers("float32"), block_size=8, max_model_len=MAX_MODEL_LEN)


def test_memory_is_alive_as_long_as_a_tensor_looks_at_it() -> None:
    outside = torch.zeros(7)
    with LiveBytes() as alive:
        first = torch.zeros(1000)
        part = first[:10]
        second = first + outside.sum()
        assert alive.live == 8000
        del first
        assert alive.live == 8000, "a view holds it"
        del part
        assert alive.live == 4000
        second += 1
        (second + 1) * 2
    assert (alive.live, alive.peak) == (4000, 12000)


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "gpt_oss"])
def test_a_step_keeps_no_more_alive_than_is_planned(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step with the kernels of a GPU, in the interpreter, whose own tensors are none of the step's."""
    from disagg.kernels.triton import backend

    launch = backend.launch

    def unseen(*args: Any, **constants: Any) -> None:
        with _disable_current_modes():
            launch(*args, **constants)
            gc.collect()  # the interpreter leaves what it was given in cycles

    monkeypatch.setattr(backend, "launch", unseen)
    model = load_model(save_family(name, folder / name))
    runner = Runner(model, make_cache(model, block_size=8, num_slots=40))
    table = np.arange(2, 10, dtype=np.int32)
    chunk = Chunk((table,) * runner.cache.layout.num_groups, [1] * 64, 0, True)
    gc.collect()
    gc.freeze()  # each collection looks at what the step itself made
    with forced("triton"), LiveBytes() as alive:
        runner.execute([chunk])
    runner.cache.close()
    plan = planned(read_skeleton(folder / name), limits(rows=1))
    assert alive.peak <= plan.activations + plan.workspaces < 2.5 * alive.peak


def test_the_plan_grows_with_steps_and_rows_and_not_with_layers(tmp_path: Path) -> None:
    def of(layers: int, asked: StepLimits) -> StepMemory:
        config = hf.LlamaConfig(
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, vocab_size=100
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path / str(layers))
        return planned(read_skeleton(tmp_path / str(layers)), with_splits(asked))

    base = of(2, limits())
    assert of(8, limits()) == base
    longer, wider = of(2, limits(128)), of(2, limits(rows=8))
    assert longer.activations > 1.5 * base.activations
    assert longer.pieces > 1.5 * base.pieces
    assert wider.sampling == 2 * base.sampling
    assert wider.decode_graphs > base.decode_graphs
    eager = of(2, limits(captures=False, pieces=False))
    assert (eager.graphs, eager.decode_graphs, eager.pieces) == (0, 0, 0)
    assert 0 < eager.workspaces < base.workspaces
    assert base.total == sum(getattr(base, name) for name in StepMemory.__slots__)
    assert "decode graphs" in base.in_words()
    assert "decode graphs" not in eager.in_words()


def test_tables_and_partial_results_of_graphs_fit_what_is_planned_for_them(folder: Path) -> None:
    skeleton = read_skeleton(save_family("gemma3", folder / "gemma3"))
    asked, layout = limits(rows=7), layout_of(skeleton)
    plan, without = (planned(skeleton, limits(rows=7, captures=captures)) for captures in (True, False))
    plans = [
        DecodePlan(
            block_size=8,
            window=group.window,
            num_sink_tokens=group.num_sink_tokens,
            max_rows=asked.max_num_seqs,
            max_tokens=MAX_MODEL_LEN,
            device=CPU,
            workspace=Workspace(),
        )
        for group in layout.groups
    ]
    taken = sum(one._there.nbytes + one._heads.nbytes + one._tiles.nbytes for one in plans)
    tables = plan.workspaces - 2 * without.workspaces
    assert taken <= tables < 1.5 * taken


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
def test_the_sampler_keeps_no_more_alive_than_is_planned_per_logit() -> None:
    from disagg.engine.sampling import triton

    logits = torch.randn(4, 8192)
    rows = [SampleRow(i, i, 1.0, 5, 0.9, -float("inf"), -1, None) for i in range(4)]
    with forced("triton"), LiveBytes() as alive:
        triton.sample(logits, rows)
    assert 0.5 * SAMPLER_NBYTES < alive.peak / logits.numel() <= SAMPLER_NBYTES
