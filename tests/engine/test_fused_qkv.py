"""Attention modules with the fused step: the logits of transformers' own forward, and who keeps that forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model.continuous import greedy, make_cache
from support.model.families import FAMILIES, WINDOW, save_family
from support.model.graphed import GraphedRunner, load_case, num_equal
from support.model.interpreter import missing_interpreter

from disagg.engine.model import fused_qkv
from disagg.engine.model.attention import WindowMismatch
from disagg.engine.model.fused_qkv import fuse
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.probe import probe
from disagg.engine.run.runner import Runner
from disagg.kernels.dispatch import CALLS, FUSED_VARIABLE, forced, fuses_qkv
from disagg.kernels.qkv import Rotary

SHARED, SHARING = "others read its KV", "reads another layer's KV"
UNFUSED = {
    "gemma3n": {3: SHARED, 4: SHARED, 5: SHARING, 6: SHARING, 7: SHARING},
    "gemma4": {3: SHARED, 4: SHARED, 5: SHARING, 6: SHARING, 7: SHARING},
    "gemma4-keqv": dict.fromkeys((2, 5), "projects Q, K and V otherwise"),
}
"""The layers that keep their own forward, and why."""
NUM_TOKENS = 4
PROMPTS = ((7, 3, 9), tuple(range(3, 3 + 2 * WINDOW + 5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


def load(name: str, folder: Path, dtype: str = "float32") -> LoadedModel:
    if not (folder / name).exists():
        save_family(name, folder / name)
    return load_model(folder / name, dtype=dtype)


def fuse_all(model: LoadedModel) -> dict[int, str]:
    return fuse(model.module, probe(model.module, "cpu"))


def logits(
    model: LoadedModel,
    *,
    uses_scratch: bool = False,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    num_tokens: int = NUM_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked prefill mixed with decode: (logits `[rows, vocab]`, tokens) of all prompts."""
    runner = Runner(model, make_cache(model, block_size=8, num_slots=60, uses_scratch=uses_scratch))
    lives = greedy(runner, prompts, num_tokens, chunk=37)
    runner.cache.close()
    tokens = torch.tensor([live.answer for live in lives])
    return torch.stack([row for live in lives for row in live.rows]), tokens


def assert_fused(name: str, model: LoadedModel, backend: str) -> None:
    """Every layer but those of `UNFUSED` took the fused step, as often as any attends."""
    num_layers = len(model.layers)
    num_steps, rest = divmod(CALLS[f"{backend}:paged_attention"], num_layers)
    unfused = UNFUSED.get(name, {})
    assert rest == 0 < num_steps
    assert CALLS[f"{backend}:preprocess_qkv"] == num_steps * (num_layers - len(unfused)) > 0
    assert CALLS[f"{backend}:write_kv"] == num_steps * sum(why != SHARING for why in unfused.values())


def first_rows(rows: torch.Tensor) -> torch.Tensor:
    """After the prompts alone: later ones follow the tokens, which a rounding may change in 16 bits."""
    return rows[::NUM_TOKENS]


@pytest.mark.parametrize("uses_scratch", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_logits_are_the_unfused_ones(name: str, uses_scratch: bool, folder: Path) -> None:
    model = load(name, folder)
    expected, tokens = logits(model, uses_scratch=uses_scratch)
    assert fuse_all(model) == UNFUSED.get(name, {})
    CALLS.clear()
    found, same = logits(model, uses_scratch=uses_scratch)
    assert torch.equal(same, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert_fused(name, model, "torch")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen2"])
def test_in_sixteen_bits_fused_is_as_near_to_float32_as_unfused(name: str, dtype: str, folder: Path) -> None:
    """It rounds once where transformers rounds several times; the models are random, so roundings grow by chance."""
    exact = first_rows(logits(load(name, folder))[0])
    model = load(name, folder, dtype)
    unfused = (first_rows(logits(model)[0]) - exact).abs().mean()
    assert fuse_all(model) == {}
    fused = (first_rows(logits(model)[0]) - exact).abs().mean()
    assert fused < 1.5 * unfused


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [n if n == "qwen3-win" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_the_kernel_itself_in_a_model(name: str, folder: Path) -> None:
    model = load(name, folder)
    work: dict[str, Any] = {"prompts": [range(3, 3 + WINDOW + 5)], "num_tokens": 2}
    expected, tokens = logits(model, **work)
    with forced("triton"):
        assert fuse_all(model) == UNFUSED.get(name, {})
        CALLS.clear()
        found, same = logits(model, **work)
    assert torch.equal(same, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert_fused(name, model, "triton")
    assert CALLS["kernel:preprocess_qkv"] == CALLS["triton:preprocess_qkv"]


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_fused_steps_in_graphs(name: str, folder: Path) -> None:
    model, references = load_case(name, folder / "graphed", 8)
    assert fuse_all(model) == {}
    CALLS.clear()
    runner = GraphedRunner(model)
    assert CALLS["triton:preprocess_qkv"] > 0
    assert num_equal(runner.answers(references, 8), references) == len(references)
    assert CALLS["graph:decode"] > 3
    load_case.cache_clear()


def test_the_documented_reasons_are_these() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/fast-paths.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    told = {row[0]: set(row[2].split("; ")) for row in rows if len(row) == 3 and row[0].startswith("Gemma") and row[2]}
    assert told == {
        "Gemma 3n, Gemma 4": set(UNFUSED["gemma3n"].values()) | set(UNFUSED["gemma4"].values()),
        "Gemma 4 with K = V": set(UNFUSED["gemma4-keqv"].values()),
    }


def test_packed_weights_are_held_once(folder: Path) -> None:
    model = load("qwen2", folder)
    held = nbytes(model.module)
    fuse_all(model)
    assert nbytes(model.module) == held
    attention = model.module.get_submodule("model.layers.0.self_attn")
    parts = [getattr(attention, name) for name in fused_qkv.PROJECTIONS]
    for name in ("weight", "bias"):
        assert len({getattr(part, name).untyped_storage().data_ptr() for part in parts}) == 1


def nbytes(module: torch.nn.Module) -> int:
    storages = {parameter.untyped_storage() for parameter in module.parameters()}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_attention_is_learnt_through_a_fused_module_too(folder: Path) -> None:
    model = load("gemma3", folder)
    calls = probe(model.module, "cpu")
    fuse_all(model)
    assert probe(model.module, "cpu") == calls


def test_another_window_than_the_caches_is_refused(folder: Path) -> None:
    model = load("gemma3", folder)
    fuse_all(model)
    layer = model.module.get_submodule("model.layers.0.self_attn").forward.__self__
    object.__setattr__(layer.call, "window", WINDOW + 1)
    with pytest.raises(WindowMismatch, match="window 25, laid out for 24"):
        logits(model)


def test_the_backend_decides_and_the_environment_overrides(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu = torch.device("cpu")
    assert not fuses_qkv(cpu)
    monkeypatch.setenv(FUSED_VARIABLE, "on")
    assert fuses_qkv(cpu)
    logits(load("llama", folder))
    assert CALLS["torch:preprocess_qkv"] > 0
    monkeypatch.setenv(FUSED_VARIABLE, "maybe")
    with pytest.raises(ValueError, match="DISAGG_FUSED_QKV='maybe': expected on or off"):
        fuses_qkv(cpu)


# --- negative controls: a step that is wrong is not taken, and were it taken, the logits would show it -----------


def break_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fused_qkv, "_norms", lambda *_: None)


def break_gain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fused_qkv, "gain_of", lambda norm, *_: norm.weight.float())  # Gemma's lacks one


def break_value_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fused_qkv, "NORMS", ("q_norm", "k_norm", "absent"))


def break_angles(patch: pytest.MonkeyPatch) -> None:
    exact = fused_qkv.Angles.of

    def neighbour(self: fused_qkv.Angles, *args: Any) -> Rotary:
        right = exact(self, *args)
        return Rotary(right.cos.roll(1, 0).contiguous(), right.sin.roll(1, 0).contiguous())

    patch.setattr(fused_qkv.Angles, "of", neighbour)


def break_table(patch: pytest.MonkeyPatch) -> None:
    """One RoPE for all layers, where windowed layers have their own."""
    exact, first = fused_qkv.Angles.of, []

    def same(self: fused_qkv.Angles, embeddings: Any, half: int) -> Rotary:
        num_queries = embeddings[0].shape[1]
        if not first or len(first[0].cos) != num_queries:
            first[:] = [exact(self, embeddings, half)]
        return first[0]

    patch.setattr(fused_qkv.Angles, "of", same)


@pytest.mark.parametrize("wrong", [break_norm, break_gain, break_angles, break_table])
def test_a_wrong_step_is_not_taken_and_would_be_noticed(
    wrong: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("gemma3", folder)
    expected, _ = logits(model)
    wrong(monkeypatch)
    refused = fuse_all(model)
    assert refused
    assert set(refused.values()) == {"other numbers"}
    assert "fused QKV differs from transformers' by" in caplog.text
    monkeypatch.setattr(fused_qkv, "_error", lambda *_: 0.0)
    assert fuse_all(model) == {}
    found, _ = logits(model)
    assert (first_rows(found) - first_rows(expected)).abs().max() > 0.1


def test_a_norm_of_v_left_out_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("gemma4", folder)
    break_value_norm(monkeypatch)
    assert {layer for layer, why in fuse_all(model).items() if why == "other numbers"} == {0, 1, 2}


def test_norms_by_different_epsilons_are_no_fused_module(folder: Path) -> None:
    model = load("gemma4", folder)
    model.module.get_submodule("model.layers.1.self_attn").v_norm.eps = 0.5  # type: ignore[union-attr]
    assert fuse_all(model) == UNFUSED["gemma4"] | {1: "norms by different epsilons"}


def test_a_bias_on_some_projections_is_no_fused_module(folder: Path) -> None:
    model = load("llama", folder)
    attention = model.module.get_submodule("model.layers.1.self_attn")
    attention.q_proj.bias = torch.nn.Parameter(torch.zeros(attention.q_proj.out_features))
    assert fuse_all(model) == {1: "has a bias on some projections"}
