"""Decode steps replayed from graphs: the tokens of eager steps, and what a graph must not hold is noticed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model.continuous import greedy, largest_error, make_cache, poison_free_slots
from support.model.fake_graph import CaptureFailed, FakeGraph
from support.model.families import FAMILIES
from support.model.graphed import GraphedRunner, load_case, num_equal
from support.model.interpreter import missing_interpreter

from disagg.cache.pool import TRASH_SLOT
from disagg.cache.scratch import Scratch
from disagg.engine.model import hf
from disagg.engine.model.load import load_model
from disagg.engine.run.graphs import decode as graphs_module
from disagg.engine.run.graphs.decode import batch_buckets
from disagg.engine.run.graphs.inputs import DecodeInputs
from disagg.engine.run.runner import Chunk, Runner
from disagg.kernels import decode_plan
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.workspace import Workspace

pytestmark = pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))

NUM_TOKENS = 14
# Every feature of attention once: windows and none, softcap, shared KV and K = V, sink logits.
QUICK = ("llama", "mistral", "gemma2", "gemma3", "gemma4", "gpt_oss")
LOGPROB_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_replayed_tokens_are_transformers_own(name: str, folder: Path) -> None:
    """Batches of 4, 3 (a row of padding), 2 and 1, as sequences join and end."""
    model, references = load_case(name, folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    lives = runner.answers(references, NUM_TOKENS)
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < LOGPROB_TOLERANCE
    assert {None, 1, 2, 4} <= set(runner.buckets)
    assert CALLS["graph:decode"] == runner.graphs.use.num_replays == sum(b is not None for b in runner.buckets) > 9


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [n if n == "gemma3" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_the_kernels_themselves_in_graphs(name: str, folder: Path) -> None:
    model, references = load_case(name, folder, NUM_TOKENS)
    runner = GraphedRunner(model, forced("triton"), max_num_seqs=2)
    assert CALLS["kernel:write_kv"] > 0
    assert CALLS["kernel:decode_attention"] + CALLS["kernel:decode_attention_split"] > 0
    some = [replace(reference, token_ids=reference.token_ids[:4]) for reference in references[1:3]]
    assert num_equal(runner.answers(some, 4), some) == len(some)
    assert CALLS["graph:decode"] >= 3


def test_fp8_kv_is_read_and_written_by_its_scales_in_graphs(folder: Path) -> None:
    """The tokens of eager steps over fp8 KV, which are not those of float32."""
    _, references = load_case("gemma3", folder, NUM_TOKENS)
    scales = folder / "scales.json"
    scales.write_text(json.dumps({str(layer): {"k": 0.25, "v": [0.5, 0.125]} for layer in range(4)}))
    model = load_model(folder / "gemma3", kv_cache_dtype="fp8_e4m3", kv_scales=scales)
    prompts = [reference.prompt for reference in references]
    eager = Runner(model, make_cache(model, block_size=8, num_slots=120))
    expected = [live.answer for live in greedy(eager, prompts, NUM_TOKENS, chunk=61)]
    graphed = GraphedRunner(model)
    assert [live.answer for live in graphed.answers(references, NUM_TOKENS)] == expected
    assert CALLS["graph:decode"] > 9
    assert expected != [reference.token_ids for reference in references]


def test_experts_are_chosen_for_the_capture_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products read sizes on the host; eager steps, where that is allowed, keep them."""
    model, references = load_case("gpt_oss", folder, NUM_TOKENS)
    config: Any = model.module.config
    assert config._experts_implementation == "grouped_mm"
    runner = GraphedRunner(model)
    assert config._experts_implementation == "grouped_mm"
    assert num_equal(runner.answers(references[:1], NUM_TOKENS), references[:1]) == 1
    monkeypatch.setattr("disagg.engine.model.hf._has_grouped_kernel", lambda *_: True)
    with pytest.raises(CaptureFailed, match=r"grouped_mm.* waits for the device"):
        GraphedRunner(model)


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (10, 0), True),
        (torch.bfloat16, (8, 0), False),
        (torch.bfloat16, (12, 0), False),
        (torch.float16, (9, 0), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_which_devices_multiply_groups_in_one_kernel(
    dtype: torch.dtype, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert hf._has_grouped_kernel(torch.device("cuda"), dtype) == expected


def test_a_batch_above_the_largest_bucket_runs_eager(folder: Path) -> None:
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    runner = GraphedRunner(model, max_num_seqs=3)
    assert num_equal(runner.answers(references, NUM_TOKENS), references) == len(references)
    assert set(runner.buckets[5:]) == {None, 3, 2, 1}


def test_graphs_write_only_where_their_sequences_are(folder: Path) -> None:
    model, _ = load_case("gemma3", folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    for pool in runner.cache.pools:
        rest = [slot for slot in range(pool.num_slots) if slot != TRASH_SLOT]
        untouched = torch.full_like(pool.memory, 0xFF)
        untouched[0] = 0
        assert torch.equal(pool.memory[rest], untouched[rest])


def test_logits_stay_the_callers(folder: Path) -> None:
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    lives = runner.answers(references[:1], NUM_TOKENS)
    assert len({row.data_ptr() for row in lives[0].rows}) == NUM_TOKENS


def test_what_capture_took_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    runner = GraphedRunner(load_case("gemma3", folder, NUM_TOKENS)[0], max_num_seqs=3)
    use = runner.graphs.use
    assert (use.num_captured, use.num_replays) == (3, 0)
    assert use.nbytes == runner.maker.nbytes > 0
    told = [record.getMessage() for record in caplog.records if record.name == graphs_module.__name__]
    assert told[:3] == [f"captured decode graph {i} of 3: batch of {n}" for i, n in ((1, 3), (2, 2), (3, 1))]
    assert told[3].startswith("3 decode graphs take ")


@pytest.mark.parametrize(
    ("max_num_seqs", "buckets"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (2000, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_num_seqs: int, buckets: tuple[int, ...]) -> None:
    assert batch_buckets(max_num_seqs) == buckets


def test_what_is_no_decode_batch_runs_eager(folder: Path) -> None:
    graphs = GraphedRunner(load_case("gemma3", folder, NUM_TOKENS)[0]).graphs
    decode = Chunk((), [3], 7, True)
    assert [graphs.bucket([decode] * n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
    assert graphs.bucket([decode, Chunk((), [3, 4], 0, True)]) is None
    assert graphs.bucket([Chunk((), [3], 0, False)]) is None
    assert graphs.bucket([replace(decode, scratch=(None, None))]) == 1
    assert graphs.bucket([replace(decode, scratch=(None, Scratch(0, (3,), 1)))]) is None


# --- negative controls ----------------------------------------------------------------------------------------


def equal_answers(folder: Path, name: str = "gemma3") -> tuple[int, int]:
    model, references = load_case(name, folder, NUM_TOKENS)
    return num_equal(GraphedRunner(model).answers(references, NUM_TOKENS), references), len(references)


@pytest.mark.parametrize("row", [0, 1])
def test_tokens_or_positions_that_are_not_copied_are_noticed(
    row: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = DecodeInputs.fill

    def forgetful(self: DecodeInputs, *args: Any) -> list[int]:
        before = self._there[row].clone()
        rows = fill(self, *args)
        self._there[row] = before
        return rows

    monkeypatch.setattr(DecodeInputs, "fill", forgetful)
    equal, count = equal_answers(folder)
    assert equal < count


def test_a_plan_that_is_not_copied_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = decode_plan.DecodePlan.fill

    def forgetful(self: decode_plan.DecodePlan, tables: Any, *args: Any) -> None:
        if self._window is None or not tables:
            fill(self, tables, *args)

    monkeypatch.setattr(decode_plan.DecodePlan, "fill", forgetful)
    equal, count = equal_answers(folder)
    assert equal < count


@pytest.mark.parametrize(("slot", "equal"), [(TRASH_SLOT, 1), (2, 0)])
def test_padding_that_writes_a_live_slot_is_noticed(
    slot: int, equal: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_plan, "TRASH_SLOT", slot)  # 2: the first that is ever allocated
    model, references = load_case("llama", folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    runner.graphs.buckets = (4,)
    assert num_equal(runner.answers(references[:1], NUM_TOKENS), references[:1]) == equal


def test_inputs_made_anew_for_each_step_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an eager step may do: a tensor that is another one at each step keeps capture's value."""
    fill, forward = DecodeInputs.fill, DecodeInputs.forward
    fresh: list[torch.Tensor] = []

    def copying(self: DecodeInputs, *args: Any) -> list[int]:
        rows = fill(self, *args)
        fresh.append(self._there.clone())
        return rows

    def careless(self: DecodeInputs, count: int) -> torch.Tensor:
        static, self._there = self._there, fresh[-1]
        try:
            return forward(self, count)
        finally:
            self._there = static

    monkeypatch.setattr(DecodeInputs, "fill", copying)
    monkeypatch.setattr(DecodeInputs, "forward", careless)
    equal, count = equal_answers(folder)
    assert equal < count


def test_a_workspace_that_would_move_after_capture_is_noticed() -> None:
    workspace, like = Workspace(), torch.empty(0, 4)
    address = workspace.rows("key", 8, like).data_ptr()
    workspace.freeze()
    assert workspace.rows("key", 3, like).data_ptr() == address
    with pytest.raises(AssertionError, match="would move"):
        workspace.rows("key", 9, like)


def test_a_fake_graph_keeps_a_graphs_rules() -> None:
    graph, given = FakeGraph(), torch.ones(3)
    held: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        held.append(given * 2)
        return held[0] + float(given.shape[0])

    out = graph.capture(run)
    given.fill_(5)
    graph.replay()
    assert out.tolist() == [13, 13, 13]
    assert len(held) == 1, "a replay ran Python"
    assert held[0].isnan().all(), "what a replay left behind may be read"


def test_memory_that_nobody_holds_any_more_is_noticed() -> None:
    graph, given = FakeGraph(), [torch.ones(3)]
    out = graph.capture(lambda: given[0] + 1)
    graph.replay()
    assert out.tolist() == [2, 2, 2]
    given.clear()
    with pytest.raises(AssertionError, match="a tensor of the graph was freed"):
        graph.replay()


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: torch.tensor([2.0])],
    ids=["reads", "selects", "decides", "copies from the host"],
)
def test_a_capture_that_waits_for_the_device_fails(wait: Any) -> None:
    with pytest.raises(CaptureFailed, match="waits for the device"):
        FakeGraph().capture(lambda: torch.ones(3) * wait(torch.ones(3)))


def test_free_slots_full_of_nan_are_never_read_by_padding(folder: Path) -> None:
    """What `greedy` poisons around every step: here a batch that is padding but for one row."""
    model, references = load_case("gpt_oss", folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    runner.graphs.buckets = (4,)
    poison_free_slots(runner.cache)
    lives = runner.answers(references[3:4], NUM_TOKENS)
    assert lives[0].answer == references[3].token_ids
    assert set(runner.buckets) == {None, 4}
