"""Loading models in the forms the hub ships them; what cannot be served is refused by name, in one sentence."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model.checkpoints import (
    edit_json,
    save_gemma3_wrapper,
    save_mxfp4_gpt_oss,
    save_other_architecture,
    shard,
    wrap_text_model,
)
from support.model.continuous import greedy, largest_error, make_cache
from support.model.families import FAMILIES, WINDOW, build_family, reference_generate, safe_prompts, save_family

from disagg.cache.layout import LayerSpec
from disagg.engine.model import hf
from disagg.engine.model import load as model
from disagg.engine.model.load import layers_from_config, load_model
from disagg.engine.model.weights import ModelRefused
from disagg.engine.run.runner import Runner


def owners(layers: tuple[LayerSpec, ...]) -> list[tuple[int | None, int, int, int]]:
    return [(layer.window, layer.num_kv_heads, layer.head_dim, layer.producer) for layer in layers]


def answer(folder: Path, prompt: tuple[int, ...], num_tokens: int = 12) -> tuple[int, ...]:
    loaded = load_model(folder)
    (live,) = greedy(Runner(loaded, make_cache(loaded, block_size=8, num_slots=60)), [prompt], num_tokens, chunk=37)
    return live.answer


# --- layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_known_before_a_weight_is_read(name: str, tmp_path: Path) -> None:
    save_family(name, tmp_path)
    expected = load_model(tmp_path).layers
    (tmp_path / "model.safetensors").unlink()
    assert layers_from_config(tmp_path, "float32") == expected


def test_layers_that_share_kv_name_their_producer(tmp_path: Path) -> None:
    built = build_family("gemma4")
    shared = [layer.self_attn.is_kv_shared_layer for layer in built.model.layers]
    assert shared == [False] * 5 + [True] * 3
    save_family("gemma4", tmp_path)
    assert owners(layers_from_config(tmp_path)) == [
        (WINDOW, 2, 16, 0),
        (WINDOW, 2, 16, 1),
        (None, 2, 32, 2),
        (WINDOW, 2, 16, 3),
        (None, 2, 32, 4),
        (WINDOW, 2, 16, 3),
        (WINDOW, 2, 16, 3),
        (None, 2, 32, 4),
    ]


def test_the_attention_signature_tells_what_differs(tmp_path: Path) -> None:
    seen = {}
    for name in ("llama", "mistral", "mistral-nowin", "gemma2", "gpt_oss"):
        seen[name] = load_model(save_family(name, tmp_path / name)).attention
    assert seen["llama"] == seen["mistral-nowin"]
    assert len(set(seen.values())) == 4
    assert seen["gemma2"].startswith(f"2xwindow-{WINDOW}+2xfull:")
    edit_json(tmp_path / "gemma2" / "config.json", attn_logit_softcapping=49.0)
    assert load_model(tmp_path / "gemma2").attention != seen["gemma2"]


# --- checkpoints as the hub ships them ----------------------------------------------------------------------


def test_shards_answer_as_one_file_does(tmp_path: Path) -> None:
    save_family("gemma3", tmp_path)
    (reference,) = safe_prompts(build_family("gemma3"), (50,), 12)
    shard(tmp_path, 3)
    assert answer(tmp_path, reference.prompt) == reference.token_ids


def test_a_bf16_checkpoint_is_bf16_unless_told_otherwise(tmp_path: Path) -> None:
    built = build_family("gemma3").to(torch.bfloat16)
    built.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype == "bfloat16"
    assert {layer.dtype for layer in loaded.layers} == {"bfloat16"}
    (reference,) = safe_prompts(built.float(), (50,), 12)
    assert load_model(tmp_path, dtype="float32").dtype == "float32"
    lives = greedy(Runner(loaded, make_cache(loaded, block_size=8, num_slots=60)), [reference.prompt], 1, chunk=37)
    first = lives[0].rows[0].log_softmax(-1)
    assert max(abs(float(first[i]) - value) for i, value in reference.top_logprobs[0]) < 0.5


def test_without_a_configured_dtype_the_weights_decide(tmp_path: Path) -> None:
    build_family("llama").to(torch.float16).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype=None)
    assert load_model(tmp_path).dtype == "float16"


def test_a_wrapper_is_served_as_its_text_model(tmp_path: Path) -> None:
    wrapper = save_gemma3_wrapper(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.module).__name__ == "Gemma3ForCausalLM"
    assert owners(loaded.layers) == [(w, 2, 16, i) for i, w in enumerate((WINDOW, WINDOW, None, WINDOW))]
    expected = wrapper.model.language_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.module.model.state_dict().items())
    (reference,) = safe_prompts(wrapper, (50,), 12)
    (live,) = greedy(Runner(loaded, make_cache(loaded, block_size=8, num_slots=60)), [reference.prompt], 12, chunk=37)
    assert live.answer == reference.token_ids
    assert largest_error(live, reference) < 2e-3


@pytest.mark.parametrize(
    ("family", "class_name", "model_type"),
    [
        ("gemma3n", "Gemma3nForConditionalGeneration", "gemma3n"),
        ("gemma4", "Gemma4ForConditionalGeneration", "gemma4"),
        ("gemma4-keqv", "Gemma4ForConditionalGeneration", "gemma4"),
    ],
)
def test_wrappers_with_sound_and_images_are_served_as_text(
    family: str, class_name: str, model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_model(save_family(family, tmp_path))
    wrap_text_model(tmp_path, class_name, model_type)
    loaded = load_model(tmp_path)
    assert loaded.layers == expected.layers
    weights = expected.module.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.module.state_dict().items())
    assert "not used" not in caplog.text


def test_older_and_newer_names_of_a_wrappers_tensors_are_read(tmp_path: Path) -> None:
    save_gemma3_wrapper(tmp_path)
    path = tmp_path / "model.safetensors"
    expected = load_model(tmp_path).module.state_dict()
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): tensor
        for name, tensor in load_file(path).items()
    }
    assert "model.language_model.norm.weight" in renamed
    save_file(renamed, path, metadata={"format": "pt"})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(tmp_path).module.state_dict().items())


def test_mxfp4_gpt_oss_is_dequantised_with_the_memory_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = save_mxfp4_gpt_oss(tmp_path)
    with caplog.at_level(logging.INFO, logger="disagg"):
        loaded = load_model(tmp_path)
    assert "dequantising MXFP4 model" in caplog.text
    assert "KiB of weights as bfloat16" in caplog.text
    parameters = dict(loaded.module.named_parameters())
    assert len(expected) == 8
    for name, weights in expected.items():
        np.testing.assert_array_equal(parameters[name].detach().double().numpy(), weights)
    prompt = tuple(range(3, 40))
    reference = reference_generate(load_model(tmp_path, dtype="float32").module, prompt, 1)
    (live,) = greedy(Runner(loaded, make_cache(loaded, block_size=8, num_slots=60)), [prompt], 1, chunk=512)
    assert largest_error(live, reference) < 0.5


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("T5ForConditionalGeneration", "t5"),
        ("MambaForCausalLM", "mamba"),
        ("Llama4ForConditionalGeneration", "llama4"),
        ("Qwen3NextForCausalLM", "qwen3_next"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("NobodysForCausalLM", "nobody"),
    ],
)
def test_an_unsupported_architecture_is_named(class_name: str, model_type: str, tmp_path: Path) -> None:
    save_other_architecture(tmp_path, class_name, model_type)
    with pytest.raises(ModelRefused, match=f"`{class_name}` is not supported; supported are Llama"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with `gptq`"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised with `mxfp4`"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE type `dynamic`"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "factor": 2.0,
                    "original_max_position_embeddings": 256,
                }
            },
            "RoPE type `longrope`",
        ),
        ({"num_hidden_layers": "four"}, "does not describe a model that can be built"),
        ({"num_attention_heads": 0}, "does not describe a model that can be built"),
        ({"num_hidden_layers": 5}, "lack 9 tensors, such as `model.layers.4"),
        ({"hidden_size": 128, "head_dim": 32}, "cannot be loaded"),
        ({"architectures": None}, "none named in config.json"),
    ],
)
def test_what_a_config_asks_for_in_vain_is_one_sentence(
    changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    save_family("llama", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ModelRefused, match=sentence) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("window", [0, -3])
@pytest.mark.parametrize("name", ["mistral", "qwen3-win", "gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss"])
def test_a_window_that_holds_no_query_is_refused_by_layer_and_number(name: str, window: int, tmp_path: Path) -> None:
    save_family(name, tmp_path)
    edit_json(tmp_path / "config.json", sliding_window=window)
    layer = 2 if name == "qwen3-win" else 0
    with pytest.raises(ModelRefused, match=f"layer {layer}: window {window}, expected at least 1, the query itself; "):
        load_model(tmp_path)


def test_layer_types_other_than_sliding_and_full_are_refused(tmp_path: Path) -> None:
    save_family("qwen3", tmp_path)
    edit_json(tmp_path / "config.json", layer_types=["full_attention"] * 3 + ["chunked_attention"])
    with pytest.raises(ModelRefused, match="layer type `chunked_attention` is not supported"):
        load_model(tmp_path)


def test_an_encoder_in_the_clothes_of_a_language_model_is_refused(tmp_path: Path) -> None:
    save_family("gemma3", tmp_path)
    edit_json(tmp_path / "config.json", use_bidirectional_attention=True)
    with pytest.raises(ModelRefused, match="use_bidirectional_attention"):
        load_model(tmp_path)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    with pytest.raises(ModelRefused, match="dtype `float8` is not supported; expected auto, float32"):
        load_model(tmp_path, dtype="float8")


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelRefused, match="no whole safetensors file"):
        load_model(tmp_path)


def test_a_model_too_large_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family("llama", tmp_path)
    monkeypatch.setattr(model, "available_nbytes", lambda: 1 << 20)
    monkeypatch.setattr(hf, "load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelRefused, match=r"does not fit: \d+ KiB of weights as float32, 1 MiB of memory"):
        load_model(tmp_path)


# --- transformers -------------------------------------------------------------------------------------------


def test_loading_reports_progress_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    save_family("llama", tmp_path)
    monkeypatch.setattr(hf, "PROGRESS_INTERVAL_S", 0.0)
    capfd.readouterr()
    with caplog.at_level(logging.INFO, logger="disagg"):
        load_model(tmp_path)
    assert "Loading weights: 39 of 39" in caplog.text
    assert capfd.readouterr().err == "", "transformers drew something"


@pytest.mark.parametrize("guarded", [True, False])
def test_a_hub_kernels_package_on_the_path_does_no_harm(guarded: bool, tmp_path: Path) -> None:
    """Without the guard the import fails, which shows that the guard is what saves it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text('__version__ = "0.18.5"\n')
    (tmp_path / "kernels-0.18.5.dist-info").mkdir()
    (tmp_path / "kernels-0.18.5.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.18.5\n")
    module = "disagg.engine.model.hf" if guarded else "transformers"
    classes = "t.LlamaForCausalLM, t.GptOssForCausalLM"
    code = f"import {module} as m; t = getattr(m, 'transformers', m); {classes}; print('fine')"
    environment = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ("fine" in done.stdout) is guarded, done.stderr
