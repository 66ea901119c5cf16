"""Steps in captured pieces: the tokens of eager steps, and the rules that make them so, each able to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.model.continuous import greedy, largest_error, make_cache
from support.model.fake_graph import CaptureFailed, FakeGraphs
from support.model.families import FAMILIES
from support.model.graphed import load_case, num_equal
from support.model.interpreter import missing_interpreter

from disagg.engine.model import opaque_attention
from disagg.engine.model.attention import CURRENT_STEP, LayerCall
from disagg.engine.model.fused_qkv import fuse
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.opaque_attention import NUM_TOKENS, attend
from disagg.engine.model.probe import probe
from disagg.engine.run.pieces.capture import Phase, PiecewiseGraphs, cut, is_attention, token_buckets
from disagg.engine.run.pieces.runner import PiecewiseRunner
from disagg.engine.run.runner import Runner
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.workspace import Workspace

NUM_TOKENS_OUT = 8
LARGEST = 64
QUICK = "gemma3"  # windows, norms, two kinds of RoPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


def make_runner(model: LoadedModel, *, max_rows: int = 4, uses_scratch: bool = False) -> PiecewiseRunner:
    cache = make_cache(model, block_size=8, num_slots=120, uses_scratch=uses_scratch)
    runner = PiecewiseRunner(model, cache, FakeGraphs(), max_num_batched_tokens=LARGEST, max_rows=max_rows)
    runner.capture()
    return runner


@pytest.fixture(scope="module")
def quick(folder: Path) -> tuple[LoadedModel, Any, PiecewiseRunner]:
    """Captured once for all tests here: tracing takes seconds. Its QKV is fused, inside the pieces too."""
    model, references = load_case(QUICK, folder, NUM_TOKENS_OUT)
    assert fuse(model.module, probe(model.module, "cpu")) == {}
    return model, references, make_runner(model, uses_scratch=True)


def assert_answers(runner: PiecewiseRunner, references: Any, chunk: int) -> None:
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS_OUT, chunk=chunk)
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < 2e-3


@pytest.mark.parametrize("chunk", [37, 61])
def test_prefill_and_mixed_steps_in_pieces_answer_as_transformers_does(quick: Any, chunk: int) -> None:
    """With scratch slots, in chunks that leave most of a bucket's tail unused, and decode rows beside them."""
    model, references, runner = quick
    runner.use.num_replays = 0
    assert_answers(runner, references, chunk)
    assert CALLS["graph:piecewise"] == runner.use.num_replays > NUM_TOKENS_OUT
    assert CALLS["graph:piece"] == CALLS["graph:piecewise"] * (len(model.layers) + 1)
    assert CALLS["torch:paged_attention"] >= CALLS["graph:piecewise"] * len(model.layers)
    assert CALLS["torch:preprocess_qkv"] == CALLS["torch:paged_attention"], "fused in every layer of every step"
    assert CALLS["torch:write_kv"] == 0


def test_pieces_in_bfloat16_are_as_near_to_float32_as_eager_steps(folder: Path) -> None:
    exact_model, references = load_case("llama", folder, NUM_TOKENS_OUT)
    model = load_model(folder / "llama", dtype="bfloat16")
    runner = make_runner(model)

    def first_rows(one: Runner) -> torch.Tensor:
        lives = greedy(one, [reference.prompt for reference in references], 1, chunk=37)
        return torch.stack([live.rows[0] for live in lives])

    def eager(of: LoadedModel) -> Runner:
        return Runner(of, make_cache(of, block_size=8, num_slots=120))

    exact = first_rows(eager(exact_model))
    expected = (first_rows(eager(model)) - exact).abs().mean()
    CALLS.clear()
    assert (first_rows(runner) - exact).abs().mean() < 1.5 * expected
    assert CALLS["graph:piecewise"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != QUICK])
def test_every_family_in_pieces(name: str, folder: Path) -> None:
    model, references = load_case(name, folder, NUM_TOKENS_OUT)
    assert_answers(make_runner(model), references, 37)
    assert CALLS["graph:piecewise"] > NUM_TOKENS_OUT


def test_a_step_larger_than_every_bucket_runs_eager(quick: Any) -> None:
    _, references, runner = quick
    assert [runner.graphs.bucket(n) for n in (1, 4, 5, 33, 64, 65)] == [4, 4, 8, 64, 64, None]
    assert_answers(runner, references[3:], 89)
    assert CALLS["graph:piecewise"] == NUM_TOKENS_OUT - 1  # all but the prompt


def test_without_captured_buckets_every_step_runs_eager(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, references, runner = quick
    monkeypatch.setattr(runner.graphs, "_args", {})
    assert_answers(runner, references[:1], 37)
    assert CALLS["graph:piecewise"] == CALLS["graph:piece"] == 0


def test_more_logits_than_there_is_room_for_run_eager(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, references, runner = quick
    monkeypatch.setattr(runner, "_last", runner._last[:1])
    assert_answers(runner, references[:2], 37)
    assert 0 < CALLS["graph:piecewise"] < NUM_TOKENS_OUT


def test_buckets_know_nothing_of_how_many_sequences_share_a_step() -> None:
    assert token_buckets(64) == (4, 8, 16, 32, 64)
    assert token_buckets(100) == (4, 8, 16, 32, 64, 100)
    assert token_buckets(3) == (3,)


def test_one_trace_serves_all_buckets_and_each_piece_has_an_entry_per_bucket(quick: Any) -> None:
    model, _, runner = quick
    assert runner.graphs.buckets == (4, 8, 16, 32, 64)
    assert len(runner.graphs.pieces) == len(model.layers) + 1
    assert {tuple(sorted(piece.entries)) for piece in runner.graphs.pieces} == {runner.graphs.buckets}
    assert runner.use.nbytes == runner.graphs.maker.nbytes > 0


# --- the operation --------------------------------------------------------------------------------------------


class OneLayer:
    """A pool of one layer and a step of three tokens, in a bucket of five."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.pool = torch.zeros(4, 2, 1, 8, 4)
        batch = PagedBatch((QueryRun(np.array([2], np.int32), 0, 3),), 8, None, 0)
        spec = Spec()
        plan = ops.plan(batch, self.pool, torch.float32, Workspace())
        self.step = {0: LayerCall(spec, self.pool, plan), 1: LayerCall(spec, self.pool, plan)}  # type: ignore[arg-type]

    def run(self, call: Callable[[], Any], count: int = 3) -> Any:
        step, tokens = CURRENT_STEP.set(self.step), NUM_TOKENS.set(count)
        try:
            return call()
        finally:
            CURRENT_STEP.reset(step)
            NUM_TOKENS.reset(tokens)


class Spec:
    """What attention asks of a layer's spec."""

    index, window, owns_kv = 0, None, True


def heads() -> list[torch.Tensor]:
    return [torch.randn(1, count, 5, 4) for count in (2, 1, 1)]


def test_what_pads_a_bucket_comes_out_as_zero_and_is_not_stored() -> None:
    layer, (query, key, value) = OneLayer(), heads()
    out = torch.full((1, 5, 2, 4), float("nan"))
    layer.run(lambda: attend(query, key, value, None, layer.pool, out, 0, 0.5, 0, 0.0))
    assert out[:, :3].isfinite().all()
    assert (out[:, :3] != 0).all()
    assert (out[:, 3:] == 0).all()
    assert torch.equal(layer.pool[2, 0, :, :3], key[0, :, :3])
    assert layer.pool[2, :, :, 3:].count_nonzero() == 0
    layer.run(lambda: attend(query, key, value, None, layer.pool, out, 0, 0.5, 0, 0.0), count=0)
    assert (out == 0).all(), "while pieces are captured"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_attention_writes_where_it_is_told(name: str) -> None:
    if name == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    with forced(name):
        layer, (query, key, value) = OneLayer(), heads()
        plan = layer.step[0].plan
        rows = [x[0, :, :3].transpose(0, 1) for x in (query, key, value)]
        ops.write_kv(layer.pool, plan, *rows[1:])
        expected = ops.paged_attention(rows[0], layer.pool, plan, scale=0.5)
        out = torch.full((3, 2, 4), float("nan"))
        made = ops.paged_attention(rows[0], layer.pool, plan, scale=0.5, out=out)
    assert made.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)


def test_the_schema_declares_what_is_written_and_nothing_else_is() -> None:
    schema = torch.ops.disagg.attend.default._schema
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == {"pool", "out"}
    assert not schema.returns
    layer, given, out = OneLayer(), heads(), torch.empty(1, 5, 2, 4)
    sinks = torch.randn(2)
    before = [x.clone() for x in (*given, sinks)]
    layer.run(lambda: attend(*given, sinks, layer.pool, out, 0, 0.5, 0, 0.0))
    assert all(torch.equal(x, y) for x, y in zip((*given, sinks), before, strict=True))


# --- the cut --------------------------------------------------------------------------------------------------


@torch.library.custom_op("disagg_test::attend_more", mutates_args=())
def attend_more(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@attend_more.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Toy:
    """Two attentions behind one piece, which allocates both outs; an operation of a similar name in it."""

    def __init__(self, *, is_shared: bool = False) -> None:
        self.layer, self.graphs, self.is_shared = OneLayer(), PiecewiseGraphs(FakeGraphs()), is_shared
        self.static = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1))
        self.result = torch.zeros(1, 5, 2, 4)

    def step(self, x: torch.Tensor, pool: torch.Tensor, result: torch.Tensor) -> None:
        y = attend_more(x) * 2
        first = y.new_empty(1, 5, 2, 4)
        second = first if self.is_shared else y.new_empty(1, 5, 2, 4)
        keys, values = y[:, :1], x[:, :1]
        attend(y, keys, values, None, pool, first, 0, 0.5, 0, 0.0)
        attend(y, values, keys, None, pool, second, 1, 0.5, 0, 0.0)
        result.copy_(first * 3 + second)

    def call(self, function: Callable[..., None]) -> None:
        self.layer.run(lambda: function(self.static, self.layer.pool, self.result))

    def capture(self) -> None:
        compiled = torch.compile(self.step, backend=self.graphs, fullgraph=True)
        with torch.inference_mode():
            self.call(compiled)
            self.graphs.learn(torch.device("cpu"), lambda: self.call(compiled))
            assert not any(piece.entries for piece in self.graphs.pieces), "a warm-up created an entry"
            self.graphs.capture(5, lambda: self.call(compiled))
        torch._dynamo.reset()

    def replayed(self) -> torch.Tensor:
        self.static += 1
        self.layer.pool.zero_()
        with torch.inference_mode():
            self.layer.run(lambda: self.graphs.replay(5))
        return self.result.clone()

    def expected(self) -> torch.Tensor:
        self.layer.pool.zero_()
        with torch.inference_mode():
            self.call(self.step)
        return self.result.clone()


def test_every_attention_has_an_out_of_its_own() -> None:
    toy = Toy()
    toy.capture()
    assert len(toy.graphs.pieces) == 2
    torch.testing.assert_close(toy.replayed(), toy.expected())
    shared = Toy(is_shared=True)  # one `out` for both: the first one's is lost
    shared.capture()
    assert not torch.allclose(shared.replayed(), toy.replayed())


def test_the_cut_is_at_our_operation_alone() -> None:
    traced = torch.fx.symbolic_trace(lambda x: attend_more(x) + 1)
    assert not any(is_attention(node) for node in traced.graph.nodes)
    whole, pieces = cut(traced, lambda name, module: module)  # type: ignore[arg-type,return-value]
    assert len(pieces) == len(list(whole.named_children())) == 1


def test_an_input_that_moved_is_noticed() -> None:
    toy = Toy()
    toy.capture()
    args = toy.graphs._args[5]
    toy.graphs._args[5] = tuple(x.clone() if x is toy.static else x for x in args)
    with pytest.raises(AssertionError, match="an input of a captured piece moved"):
        toy.replayed()
    assert toy.graphs.turn.phase is Phase.EAGER


def test_a_second_trace_is_refused() -> None:
    graphs = PiecewiseGraphs(FakeGraphs())
    traced = torch.fx.symbolic_trace(lambda x: x + 1)
    graphs(traced, ())
    with pytest.raises(AssertionError, match="traced twice"):
        graphs(traced, ())


def test_a_piece_that_waits_for_the_device_cannot_be_captured() -> None:
    graphs = PiecewiseGraphs(FakeGraphs())
    run = graphs(torch.fx.symbolic_trace(lambda x: x * x.sum().item()), ())
    graphs.learn(torch.device("cpu"), lambda: run(torch.ones(4)))
    with pytest.raises(CaptureFailed, match="waits for the device"):
        graphs.capture(4, lambda: run(torch.ones(4)))


# --- negative controls over a whole model -----------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["_token_ids", "_positions"])
def test_an_input_that_is_not_copied_is_noticed(forgotten: str, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, references, runner = quick
    monkeypatch.setattr(runner, forgotten, torch.zeros_like(getattr(runner, forgotten)))
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS_OUT, chunk=37)
    assert num_equal(lives, references) < len(references)


def test_attention_that_takes_padding_for_tokens_is_noticed(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, references, runner = quick
    exact = opaque_attention.packed_attention
    monkeypatch.setattr(opaque_attention, "packed_attention", lambda n, qkv, **o: exact(n, qkv.flip(0), **o))
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS_OUT, chunk=37)
    assert num_equal(lives, references) < len(references)
