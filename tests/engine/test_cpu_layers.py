"""Models as CPU workers run them: the answers of transformers' own generate, and which modules keep their forward."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model.continuous import Live, greedy, largest_error, make_cache
from support.model.families import FAMILIES, WINDOW, Reference, safe_prompts, save_family
from torch import nn

from disagg.engine.model.cpu_layers import suit_cpu
from disagg.engine.model.decode_loop import AngleTable, DecodeLoop
from disagg.engine.model.decoder_layer import NativeDecoder, owner
from disagg.engine.model.gated_layer import GatedLayer, suit_gated
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.native_norm import NativeNorm, suit_norm
from disagg.engine.model.probe import probe
from disagg.engine.run.runner import Runner
from disagg.kernels import native_layers, native_matmul
from disagg.kernels.dispatch import CALLS, FUSED_VARIABLE
from disagg.kernels.native_decoder import DECODER

needs_helper = pytest.mark.skipif(
    not native_matmul.serves(torch.float32) and not native_layers.is_loaded(),
    reason="the compiled helper is not loaded, or this processor has no AVX2",
)
pytestmark = needs_helper
NUM_TOKENS = 12
LENGTHS = (1, WINDOW - 1, WINDOW + 1, 3 * WINDOW + 17)
LOGPROB_TOLERANCE = 2e-3
IN_PARTS = {"gemma3n", "gemma4", "gemma4-keqv", "gpt_oss"}
"""Families with layers that do not decode in one call: they have experts, share KV or have more parts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


@cache
def load_case(name: str, folder: Path) -> tuple[LoadedModel, tuple[Reference, ...]]:
    model = load_model(save_family(name, folder / name))
    return model, tuple(safe_prompts(model.module, LENGTHS, NUM_TOKENS))


def suited(model: LoadedModel) -> LoadedModel:
    fast = replace(model, module=deepcopy(model.module))
    suit_cpu(fast.module)
    return fast


def answers(model: LoadedModel, references: tuple[Reference, ...]) -> list[Live]:
    runner = Runner(model, make_cache(model, block_size=8, num_slots=140))
    lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    runner.cache.close()
    return lives


def count(model: nn.Module, kind: type[Any]) -> int:
    return sum(owner(module, kind) is not None for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_and_decode_steps_answer_as_transformers_does(name: str, folder: Path) -> None:
    model, references = load_case(name, folder)
    fast = suited(model)
    assert (count(fast.module, NativeDecoder) == len(model.layers)) == (name not in IN_PARTS)
    assert count(fast.module, DecodeLoop) == (name not in IN_PARTS)
    CALLS.clear()
    lives = answers(fast, references)
    assert (CALLS[DECODER] > 0) == (count(fast.module, NativeDecoder) > 0)
    assert (CALLS[native_layers.NORM] > 0) == (count(fast.module, NativeNorm) > 0)
    assert (CALLS[native_layers.GATE] > 0) == (count(fast.module, GatedLayer) > 0)
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < LOGPROB_TOLERANCE


def test_attention_is_learnt_through_a_suited_model_too(folder: Path) -> None:
    model, _ = load_case("gemma3", folder)
    assert probe(suited(model).module, "cpu") == probe(model.module, "cpu")


def test_without_the_fused_step_norms_and_gates_remain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, references = load_case("gemma3", folder)
    monkeypatch.setenv(FUSED_VARIABLE, "off")
    fast = suited(model)
    assert count(fast.module, NativeDecoder) == 0
    assert count(fast.module, GatedLayer) == len(model.layers)
    assert [live.answer for live in answers(fast, references)] == [reference.token_ids for reference in references]


def test_sixteen_bits_keep_transformers_forward(folder: Path) -> None:
    load_case("gemma3", folder)
    model = load_model(folder / "gemma3", dtype="bfloat16")
    suit_cpu(model.module)
    assert count(model.module, NativeNorm) == count(model.module, GatedLayer) == count(model.module, NativeDecoder) == 0


def test_with_two_threads_layers_decode_in_parts(folder: Path) -> None:
    model, references = load_case("gemma3", folder)
    torch.set_num_threads(2)
    try:
        fast = suited(model)
        assert count(fast.module, NativeDecoder) == 0
        CALLS.clear()
        lives = answers(fast, references)
    finally:
        torch.set_num_threads(1)
    assert CALLS[native_layers.QKV] > 0
    assert not CALLS[native_matmul.MULTIPLY]
    assert [live.answer for live in lives] == [reference.token_ids for reference in references]


# --- negative controls: a module that does something else keeps its forward ----------------------------------


class Gated(nn.Module):
    """A gated layer that adds `more` to what it gates."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down_proj, self.act_fn, self.more = nn.Linear(16, 8, bias=False), nn.SiLU(), more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + self.more))
        return made


def test_a_gated_layer_with_a_step_more_is_left_alone() -> None:
    assert suit_gated(Gated(0.0))
    other = Gated(0.01)
    assert not suit_gated(other)
    assert set(dict(other.named_children())) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    unknown = Gated(0.0)
    unknown.act_fn = nn.GELU()  # by the error function
    assert not suit_gated(unknown)


class SomeRMSNorm(nn.Module):
    def __init__(self, more: float) -> None:
        super().__init__()
        self.weight, self.eps, self.more = nn.Parameter(torch.rand(8)), 1e-6, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps) + self.more * x.sign()


def test_a_norm_that_does_more_is_left_alone() -> None:
    assert suit_norm(SomeRMSNorm(0.0))
    assert not suit_norm(SomeRMSNorm(0.01))


def test_a_layer_whose_parts_are_summed_otherwise_decodes_by_its_own_forward(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As families do that scale what they add."""
    model, _ = load_case("gemma3", folder)
    kind = type(model.module.get_submodule("model.layers.0"))
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **options: own(self, x, **options) * 1.01)
    fast = suited(model)
    assert count(fast.module, NativeDecoder) == 0
    assert count(fast.module, GatedLayer) == len(model.layers)


def test_a_model_that_does_more_between_its_layers_keeps_its_own_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_case("llama", folder)
    own = type(model.module.base_model).forward

    def other(self: Any, *args: Any, **options: Any) -> Any:
        out = own(self, *args, **options)
        out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    monkeypatch.setattr(type(model.module.base_model), "forward", other)
    fast = suited(model)
    assert count(fast.module, DecodeLoop) == 0
    assert count(fast.module, NativeDecoder) == len(model.layers)


def test_a_table_of_angles_grows_and_holds_what_the_module_makes(folder: Path) -> None:
    model, _ = load_case("gemma3", folder)
    rotary = model.module.get_submodule("model.rotary_emb")
    table = AngleTable(rotary, "sliding_attention", 8)
    for positions in (torch.tensor([3, 0, 3]), torch.tensor([4096, 5]), torch.tensor([9000])):
        found, made = table.of(positions), table.made(positions)
        assert torch.equal(found.cos, made.cos)
        assert torch.equal(found.sin, made.sin)
