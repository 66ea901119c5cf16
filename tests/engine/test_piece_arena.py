"""The memory of captured pieces: one arena, which layers and buckets share, and no reader finds taken too early."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.model.continuous import greedy, make_cache
from support.model.fake_graph import FakeGraphs
from support.model.families import BASE, safe_prompts
from support.model.graphed import num_equal

from disagg.engine.model.hf import transformers as hf
from disagg.engine.model.load import load_model, read_skeleton
from disagg.engine.run.pieces import capture
from disagg.engine.run.pieces.arena import ALIGNMENT, Arena, Handed, Key, Span, look, place, spans
from disagg.engine.run.pieces.runner import PiecewiseRunner
from disagg.engine.step_memory import StepLimits, plan_step_memory

LARGEST = 64
NUM_TOKENS_OUT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@cache
def saved(num_layers: int, folder: Path) -> Path:
    torch.manual_seed(num_layers)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**BASE | {"num_hidden_layers": num_layers})).eval()
    model.save_pretrained(folder / str(num_layers))
    return folder / str(num_layers)


@cache
def captured(num_layers: int, folder: Path) -> PiecewiseRunner:
    model = load_model(saved(num_layers, folder))
    runner = PiecewiseRunner(
        model, make_cache(model, block_size=8, num_slots=60), FakeGraphs(), max_num_batched_tokens=LARGEST, max_rows=4
    )
    runner.capture()
    return runner


def arena_of(runner: PiecewiseRunner) -> Arena:
    assert runner.graphs.turn.arena is not None
    return runner.graphs.turn.arena


def taken(runner: PiecewiseRunner, num_graphs: int | None = None) -> int:
    """By the arena, and by what graphs share beside it."""
    maker: Any = runner.graphs.maker
    return arena_of(runner).nbytes + FakeGraphs(maker.graphs[:num_graphs]).nbytes


def test_memory_does_not_grow_with_layers_nor_with_buckets(folder: Path) -> None:
    sizes = {}
    for num_layers in (2, 4, 8):
        runner = captured(num_layers, folder)
        assert len(runner.graphs.pieces) == num_layers + 1
        sizes[num_layers] = taken(runner)
        largest_alone = taken(runner, len(runner.graphs.pieces))  # the largest bucket is captured first
        assert sizes[num_layers] <= 1.2 * largest_alone
    assert max(sizes.values()) <= 1.1 * min(sizes.values()), sizes


def test_outputs_lie_in_the_arena_which_the_graphs_hold(folder: Path) -> None:
    runner = captured(2, folder)
    arena = arena_of(runner)._memory.untyped_storage().data_ptr()
    inputs = {
        x.untyped_storage().data_ptr() for args in runner.graphs._args.values() for x in args if hasattr(x, "shape")
    }
    for piece in runner.graphs.pieces:
        for entry in piece.entries.values():
            outputs = entry.outputs if isinstance(entry.outputs, tuple) else (entry.outputs,)
            for output in (x for x in outputs if isinstance(x, torch.Tensor)):
                assert output.untyped_storage().data_ptr() in {arena, *inputs}


def test_pieces_take_no_more_than_is_planned_for_them(folder: Path) -> None:
    runner = captured(4, folder)
    skeleton = read_skeleton(saved(4, folder))
    limits = StepLimits(4, LARGEST, 128, captures=False, pieces=True)
    plan = plan_step_memory(skeleton, runner.cache.layout, "float32", limits, torch.device("cpu"))
    assert taken(runner) <= plan.pieces < 2 * taken(runner)


def test_a_place_that_is_taken_again_too_early_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places given up when the piece that filled them ends, as if no later one read them: wrong tokens."""
    model = load_model(saved(4, folder))
    references = safe_prompts(model.module, (5, 40), NUM_TOKENS_OUT)

    def num_right() -> int:
        runner = PiecewiseRunner(
            model, make_cache(model, block_size=8, num_slots=60), FakeGraphs(), max_num_batched_tokens=16, max_rows=4
        )
        runner.capture()
        lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS_OUT, chunk=13)
        return num_equal(lives, references)

    assert num_right() == len(references)
    exact = capture.spans

    def early(*args: Any) -> dict[Key, Span]:
        """The angles, which all layers read, lie where the second piece puts what it makes."""
        found = exact(*args)
        return {key: Span(span.nbytes + 4096 * (span.last > 3), span.first, span.first) for key, span in found.items()}

    monkeypatch.setattr(capture, "spans", early)
    assert num_right() < len(references)


# --- how long, and where ------------------------------------------------------------------------------------------


def traced() -> torch.fx.GraphModule:
    """a makes x and y, b reads y, c hands x on under another name, d reads that."""
    graph = torch.fx.Graph()
    given_ = graph.placeholder("given")
    a = graph.call_module("a", (given_,))
    x, y, same = (graph.call_function(operator.getitem, (a, i)) for i in range(3))
    graph.call_module("b", (y,))
    alias = graph.call_module("c", (x,))
    graph.output(graph.call_module("d", (alias, same)))
    return torch.fx.GraphModule({name: torch.nn.Identity() for name in "abcd"}, graph)


def test_a_value_is_needed_up_to_its_last_reader_under_any_name() -> None:
    handed = {"a": (Handed(0, 100), Handed(1, 50), Handed(given=0)), "c": (Handed(given=0),), "d": (Handed(0, 7),)}
    assert spans(traced(), handed) == {("a", 0): Span(100, 0, 3), ("a", 1): Span(50, 0, 1), ("d", 0): Span(7, 3, 4)}


def test_outputs_are_told_apart_by_the_memory_they_look_at() -> None:
    given_, own = torch.zeros(8), torch.zeros(16)
    outputs = (given_[2:], own[:4], 5, own.view(4, 4).T, torch.zeros(3))
    assert look((7, given_), outputs, frozenset({4})) == (
        Handed(given=1),
        Handed(0, 64),
        Handed(),
        Handed(0, 64),
        Handed(1, 12, is_blank=True),
    )


def test_what_is_kept_has_the_numbers_and_strides_of_what_was_made() -> None:
    base = torch.arange(24.0)
    made = (base[4:16].view(3, 4).T, base[:4], torch.ones(1, 1, 2).expand(3, 4, 2), torch.full((2,), torch.nan), 9)
    handed = look((), made, frozenset({3}))
    wanted = {("p", number): Span(96, 0, 1) for number in range(3)}
    arena = Arena(wanted, torch.device("cpu"))
    kept = arena.keep("p", handed, made)
    for output, own in zip(kept[:3], made[:3], strict=True):
        assert torch.equal(output, own)
        assert (output.stride(), output.dtype) == (own.stride(), own.dtype)
        assert output.untyped_storage().data_ptr() == arena._memory.untyped_storage().data_ptr()
    assert kept[0].data_ptr() - kept[1].data_ptr() == 16, "views of one memory stay that"
    assert (kept[3] == 0).all(), "what is blank is not copied"
    assert kept[4] == 9
    with pytest.raises(AssertionError, match="more than in the largest bucket"):
        arena.keep("p", look((), (torch.zeros(25),), frozenset()), (torch.zeros(25),))


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=30))
def test_values_that_are_needed_at_once_never_overlap(drawn: list[tuple[int, int, int]]) -> None:
    wanted = {("p", i): Span(nbytes, first, first + more) for i, (nbytes, first, more) in enumerate(drawn)}
    at, total = place(wanted)
    assert clash(wanted, at) is None
    assert all(offset % ALIGNMENT == 0 and offset + wanted[key].nbytes <= total for key, offset in at.items())
    live = [sum(s.nbytes for s in wanted.values() if s.first <= part <= s.last) for part in range(30)]
    assert max(live) <= total <= 2 * max(live) + ALIGNMENT * len(wanted)


def test_the_check_above_finds_a_clash() -> None:
    wanted = {("p", 0): Span(10, 0, 2), ("p", 1): Span(10, 2, 3)}
    assert clash(wanted, {("p", 0): 0, ("p", 1): 9}) is not None
    assert clash(wanted, {("p", 0): 0, ("p", 1): 10}) is None


def clash(wanted: Mapping[Key, Span], at: Mapping[Key, int]) -> tuple[int, int] | None:
    """(part, byte) that two values have: each byte of each part is looked at."""
    for part in range(30):
        owners: dict[int, Key] = {}
        for key, span in wanted.items():
            if span.first <= part <= span.last:
                edges = range(at[key], at[key] + span.nbytes)
                for byte in edges:
                    if owners.setdefault(byte, key) != key:
                        return part, byte
    return None
