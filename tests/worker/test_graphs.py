"""When a worker captures decode graphs, and what it does when it cannot."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model.continuous import make_cache
from support.model.fake_graph import CaptureFailed, FakeGraph, FakeGraphs
from support.model.families import save_family
from support.model.interpreter import missing_interpreter
from support.oracles.plan_attention import plan_attention

from disagg.config.settings import Role, WorkerSettings
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.graphs.decode import GraphRunner
from disagg.engine.run.graphs.use import GraphUse
from disagg.engine.run.pieces import runner as piecewise_runner
from disagg.engine.run.runner import Runner
from disagg.engine.step_memory import StepMemory, StepMemoryShort
from disagg.kernels.dispatch import forced
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.worker import build

pytestmark = pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))


STAGES = ("tracing the model and capturing its pieces", "capturing decode graphs")


class Cuda:
    """A device that says so, where tensors can be made: the CPU."""

    type = "cuda"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_family("llama", tmp_path_factory.mktemp("llama")))


def made(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, role: Role = "decode", **settings: Any) -> Any:
    """(runner, use, graphs) of a worker whose device is said to be CUDA while it decides."""
    told: list[str] = []
    makers: list[FakeGraphs] = []

    def graphs(*_: object) -> FakeGraphs:
        makers.append(FakeGraphs())
        return makers[-1]

    def decode_graphs(_model: object, *args: Any, **options: Any) -> Any:
        return exact(model, *args, **options)

    exact = build.DecodeGraphs
    monkeypatch.setattr(build, "CudaGraphs", graphs)
    monkeypatch.setattr(build, "DecodeGraphs", decode_graphs)
    said = replace(model, device=settings.pop("device", Cuda()))
    cache = make_cache(model, block_size=8, num_slots=20)
    with plan_attention():
        asked = WorkerSettings(max_num_seqs=2, **settings)
        runner, use = build.make_runner(asked, role, said, cache, 64, told.append, StepMemory(decode_graphs=3 << 20))
    cache.close()
    assert told == [stage for stage in STAGES if stage in told]
    return runner, use, [graph for maker in makers for graph in maker.graphs]


def test_a_worker_that_decodes_on_cuda_captures(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, use, graphs = made(model, monkeypatch)
    assert isinstance(runner, GraphRunner)
    assert (use.num_captured, len(graphs)) == (2, 2)


@pytest.mark.parametrize(
    "told", [{"enforce_eager": True}, {"role": "prefill"}, {"device": torch.device("cpu")}], ids=str
)
def test_others_run_eager(told: dict[str, Any], model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, use, graphs = made(model, monkeypatch, **told)
    assert isinstance(runner, Runner)
    assert (use, graphs) == (GraphUse(), [])


def test_pieces_are_captured_where_they_are_asked_for(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pieces:
        """Stands for what `tests/engine/test_piecewise.py` tests, without the seconds that tracing takes."""

        def __init__(self, _model: object, _cache: object, maker: FakeGraphs, *, use: GraphUse, **bounds: int) -> None:
            self.maker, self.use, self.bounds = maker, use, bounds

        def capture(self) -> None:
            self.maker.new()
            self.use.add(1, 5)

    monkeypatch.setattr(piecewise_runner, "PiecewiseRunner", Pieces)
    asked = {"piecewise_graphs": True, "max_num_batched_tokens": 8}
    runner, use, graphs = made(model, monkeypatch, "prefill", **asked)
    assert runner.bounds == {"max_num_batched_tokens": 8, "max_rows": 2}
    assert (use.num_captured, use.nbytes, len(graphs)) == (1, 5, 1)
    runner, use, graphs = made(model, monkeypatch, "decode", **asked)
    assert isinstance(runner, GraphRunner)
    assert (use.num_captured, len(graphs)) == (3, 3)


def test_pieces_that_cannot_be_captured_here_are_said_to_be_none(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner, _, _ = made(model, monkeypatch, piecewise_graphs=True, device=torch.device("cpu"))
    assert type(runner) is Runner
    assert "`--piecewise-graphs`: this worker captures no graphs" in caplog.text


def test_a_model_that_cannot_be_captured_runs_eager_and_says_so(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise CaptureFailed("item waits for the device\nmore")

    monkeypatch.setattr(FakeGraph, "capture", refuse)
    runner, use, _ = made(model, monkeypatch)
    assert isinstance(runner, Runner)
    assert use == GraphUse(refusal="capture failed: item waits for the device"), "what `up` shows"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["steps run without CUDA graphs: capture failed: item waits for the device"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_graphs_that_do_not_fit_end_the_start_with_a_sentence(
    error: RuntimeError, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(FakeGraph, "capture", refuse)
    with pytest.raises(StepMemoryShort, match=r"3 MiB were planned .* are free now; lower .* `--enforce-eager`"):
        made(model, monkeypatch)


def test_the_backend_that_compiles_is_warmed_up_before_a_worker_is_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warmed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(build, "warm_up", lambda *args: warmed.append(args))
    settings = WorkerSettings(
        model=str(save_family("llama", tmp_path)), kv_cache_memory=1 << 20, max_model_len=64, max_num_seqs=2, threads=1
    )
    told: list[str] = []
    for serves, expected in (("torch", 0), ("triton", 1)):
        with forced(serves):
            parts = build.make_engine(settings, "prefill", ClusterKeys.published(), told.append)
        assert len(warmed) == told.count("compiling") == expected
        assert not warmed or warmed[0][1:] == (parts.cache, 64)
        parts.cache.close()
