"""A cache of another dtype than the model computes in: what is stored, what it is worth, what answers become."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model.continuous import Live, greedy, make_cache
from support.model.families import Reference, safe_prompts, save_family
from support.model.interpreter import missing_interpreter

from disagg.cache.layout import LayerSpec, derive_layout
from disagg.engine.model.kv_dtype import check_kv_dtype
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.weights import ModelRefused
from disagg.engine.run.runner import Chunk, Runner
from disagg.kernels.dispatch import FUSED_VARIABLE, forced

BLOCK_SIZE = 8
# Largest error of the five likeliest tokens' logprobs, three times what was measured on this random model.
TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 0.03, "fp8_e4m3": 0.3, "int8": 0.15}
NUM_HEADS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_family("gemma3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    return safe_prompts(load_model(folder).module, (8, 33, 80), 4)


def error_of(model: LoadedModel, references: list[Reference]) -> tuple[float, list[Live]]:
    runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=100))
    lives = greedy(runner, [reference.prompt for reference in references], 2, chunk=37)
    errors = [
        abs(float(live.rows[0].log_softmax(-1)[token]) - value)
        for live, reference in zip(lives, references, strict=True)
        for token, value in reference.top_logprobs[0]
    ]
    runner.cache.close()
    return max(errors), lives


def stored(model: LoadedModel, prompt: tuple[int, ...]) -> tuple[torch.Tensor, Runner]:
    """The first layer's K and V of a prompt as its pool holds them, `[2, head, token, dim]`."""
    runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=100))
    cache = runner.cache
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=len(prompt), history=0)
    runner.execute([Chunk(sequence.tables, prompt, 0, True)])
    group, _ = cache.layout.place(0)
    blocks = cache.layer_view(0)[torch.from_numpy(sequence.tables[group].astype(np.int64))].clone()
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : len(prompt)], runner


@pytest.mark.parametrize("dtype", [dtype for dtype in TOLERANCE if dtype != "int8"])
def test_answers_stay_within_what_the_dtype_can_hold(dtype: str, folder: Path, references: list[Reference]) -> None:
    model = load_model(folder, dtype="float32", kv_cache_dtype=dtype)
    assert {layer.dtype for layer in model.layers} == {dtype.replace("fp8_e4m3", "float8_e4m3fn")}
    error, _ = error_of(model, references)
    assert error < TOLERANCE[dtype]
    coarser = {"float16": "float32", "bfloat16": "float16", "fp8_e4m3": "bfloat16"}
    assert dtype not in coarser or error > TOLERANCE[coarser[dtype]] / 10, "the cache does not store this dtype"


def with_scales(model: LoadedModel, k: float, v: float) -> LoadedModel:
    scales = ((k,) * NUM_HEADS, (v,) * NUM_HEADS)
    model.saturated.zero_()
    return replace(model, layers=tuple(replace(layer, scales=scales) for layer in model.layers))


@pytest.mark.parametrize("fused", ["off", "on"])
def test_what_is_stored_in_fp8_is_within_its_bound_and_twice_the_scale_is_not(
    fused: str, folder: Path, references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's KV does not depend on what was stored before, so both runs compute the same."""
    monkeypatch.setenv(FUSED_VARIABLE, fused)
    prompt = references[-1].prompt
    exact, _ = stored(load_model(folder), prompt)
    fp8 = load_model(folder, dtype="float32", kv_cache_dtype="fp8_e4m3")
    for k, v in ((1.0, 1.0), (0.05, 0.3)):
        raw, runner = stored(with_scales(fp8, k, v), prompt)
        scale = torch.tensor([k, v])[:, None, None, None]
        worth = raw.float() * scale
        bound = torch.maximum(exact.abs() / 16, scale / 1024)
        assert ((worth - exact).abs() <= bound).all()
        assert not ((2 * worth - exact).abs() <= bound).all()
        (error, _), scaled = error_of(runner.model, references), with_scales(fp8, 2 * k, 2 * v)
        assert error < TOLERANCE["fp8_e4m3"]
        cache = runner.cache  # read with twice the scale that it was written with
        again = Runner(scaled, cache).execute([Chunk(cache._sequences["a"].tables, prompt[-1:], len(prompt) - 1, True)])
        wrong = again[0].log_softmax(-1)
        assert max(abs(float(wrong[t]) - p) for t, p in references[-1].top_logprobs[0]) > TOLERANCE["fp8_e4m3"]
        assert int(runner.model.saturated) == 0


def test_numbers_beyond_the_range_become_the_largest_and_are_counted(folder: Path, references: list[Reference]) -> None:
    prompt = references[0].prompt
    exact, _ = stored(load_model(folder), prompt)
    fp8 = with_scales(load_model(folder, dtype="float32", kv_cache_dtype="fp8_e4m3"), 1e-3, 1.0)
    raw, runner = stored(fp8, prompt)
    beyond = exact[0].abs() > 0.448
    assert beyond.any()
    assert torch.equal(raw[0].float()[beyond].abs(), torch.full((int(beyond.sum()),), 448.0))
    assert int(runner.model.saturated) >= int(beyond.sum())  # the other layers' too


def test_a_block_of_fp8_takes_a_quarter_of_the_memory() -> None:
    sizes = [
        derive_layout([LayerSpec(0, None, 0, 2, 16, dtype, 0)], block_size=16, max_model_len=64).slot_nbytes
        for dtype in ("float32", "float16", "float8_e4m3fn")
    ]
    assert sizes == [(2 * 2 * 16 * 16 * nbytes,) for nbytes in (4, 2, 1)]


# --- int8 -----------------------------------------------------------------------------------------------------


def int8_scales(folder: Path, references: list[Reference], file: Path) -> Path:
    """Scales as an operator measures them: the largest number of K and of V in each layer, over 127."""
    model = load_model(folder)
    runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=100))
    sequence = runner.cache.open("a")
    prompt = references[-1].prompt
    assert runner.cache.resize(sequence, capacity=len(prompt), history=0)
    runner.execute([Chunk(sequence.tables, prompt, 0, True)])
    found = {}
    for layer in model.layers:
        group, _ = runner.cache.layout.place(layer.index)
        slots = sequence.tables[group]
        held = runner.cache.layer_view(layer.index)[torch.from_numpy(slots[slots > 0].astype(np.int64))]
        key, value = held.nan_to_num(0).abs().amax((0, 3, 4)) * 1.1 / 127
        found[str(layer.index)] = {"k": key.tolist(), "v": value.tolist()}
    file.write_text(json.dumps(found))
    return file


@pytest.mark.parametrize("fused", ["off", "on"])
def test_answers_over_int8_stay_within_its_bound_and_scales_wrong_by_two_do_not(
    fused: str, folder: Path, references: list[Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FUSED_VARIABLE, fused)
    file = int8_scales(folder, references, tmp_path / "scales.json")
    model = load_model(folder, dtype="float32", kv_cache_dtype="int8", kv_scales=file)
    assert {layer.dtype for layer in model.layers} == {"int8"}
    error, _ = error_of(model, references)
    assert TOLERANCE["float16"] / 10 < error < TOLERANCE["int8"]
    exact, _ = stored(load_model(folder), references[-1].prompt)
    raw, _ = stored(model, references[-1].prompt)
    assert model.layers[0].scales is not None
    scale = torch.tensor(model.layers[0].scales)[..., None, None]
    assert ((raw.float() * scale - exact).abs() <= scale * 0.501).all()
    assert not ((raw.float() * 2 * scale - exact).abs() <= scale * 0.501).all()
    halved = tuple(replace(layer, scales=halves(layer.scales)) for layer in model.layers)
    wrong = replace(model, layers=halved)
    assert error_of(wrong, references)[0] > error
    assert int(wrong.saturated) > 0


def halves(scales: Any) -> Any:
    return tuple(tuple(scale / 2 for scale in half) for half in scales)


def test_int8_asks_for_scales(tmp_path: Path) -> None:
    save_family("gemma3", tmp_path)
    with pytest.raises(ModelRefused, match="neither `--kv-scales` nor the checkpoint has scales of layer 0"):
        load_model(tmp_path, kv_cache_dtype="int8")
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layers = load_model(tmp_path, kv_cache_dtype="int8").layers
    assert layers[0].scales is not None
    assert layers[0].scales[0] == pytest.approx((0.5 * 448 / 127,) * 2), "the same range in other steps"
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"1": {"k": 0.5, "v": 1}}))
    with pytest.raises(ModelRefused, match="scales of layer 0"):
        load_model(tmp_path, kv_cache_dtype="int8", kv_scales=file)


# --- where scales come from -----------------------------------------------------------------------------------


def scales_of(folder: Path, **options: Any) -> list[object]:
    return [layer.scales for layer in load_model(folder, kv_cache_dtype="fp8_e4m3", **options).layers]


def test_scales_come_from_a_file_else_from_the_checkpoint_else_are_one(tmp_path: Path) -> None:
    save_family("gemma3", tmp_path)
    assert scales_of(tmp_path) == [None] * 4
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    tensors["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor([0.25])
    tensors["model.layers.2.self_attn.attn.v_scale"] = torch.tensor([2.0, 4.0], dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    own = [((0.5, 0.5), (0.25, 0.25)), None, ((1.0, 1.0), (2.0, 4.0)), None]
    assert scales_of(tmp_path) == own
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"1": {"k": 0.5, "v": [1, 2]}}))
    assert scales_of(tmp_path, kv_scales=file) == [None, ((0.5, 0.5), (1.0, 2.0)), None, None]
    assert [layer.scales for layer in load_model(tmp_path).layers] == [None] * 4, "another dtype has no scales"


BAD_FILES = (
    "no json",
    "[1]",
    '{"9": {"k": 1, "v": 1}}',
    '{"x": {"k": 1, "v": 1}}',
    '{"0": {"k": 1}}',
    '{"0": {"k": [1, 1, 1], "v": 1}}',
    '{"0": {"k": 0, "v": 1}}',
    '{"0": {"k": -1, "v": 1}}',
    '{"0": {"k": "a", "v": 1}}',
)


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_file_of_scales_that_fits_no_model_is_refused_in_a_sentence(
    content: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "scales.json"
    file.write_text(content)
    with pytest.raises(ModelRefused, match="--kv-scales"):
        load_model(folder, kv_cache_dtype="fp8_e4m3", kv_scales=file)


def test_scales_without_fp8_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="only fp8 and int8 KV have scales"):
        load_model(folder, kv_cache_dtype="float16", kv_scales=tmp_path / "scales.json")


# --- what a device has ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "is_refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
)
def test_fp8_is_refused_in_a_sentence_where_the_gpu_has_no_such_numbers(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := missing_interpreter():
        pytest.skip(missing)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_kv_dtype("bfloat16", cuda)
    check_kv_dtype("float8_e4m3fn", torch.device("cpu"))
    with forced("torch"):
        check_kv_dtype("float8_e4m3fn", cuda)
    with pytest.raises(ModelRefused, match=r"capability 8\.\d, which has no fp8") if is_refused else nullcontext():
        check_kv_dtype("float8_e4m3fn", cuda)
