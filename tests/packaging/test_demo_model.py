"""The bundled model is an ordinary checkpoint that writes words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parents[2] / "disagg" / "demo_model"
BOS = 2
MOST_NBYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)


def test_the_folder_holds_what_a_hub_checkpoint_holds() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "NOTICE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= MOST_NBYTES


def test_the_config_says_window_64_and_three_sliding_layers_before_a_full_one() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["sliding_window"] == 64
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    assert not [key for key in config if key.startswith("_")]


def test_the_weights_are_bfloat16_and_all_finite() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (not a dict)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) == 3_674_880


@pytest.mark.parametrize(
    "text",
    [
        "The list is returned.",
        "  two  spaces\n\n\ttab ",
        "naïve 日本語 🎉 \u0000",
        "it 's , ok . n't",
        "<bos> literally",
    ],
)
def test_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_a_plain_prompt_carries_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("If the file exists").count(BOS) == 1
    assert tokenizer.encode("If the file exists")[0] == BOS


def test_a_chat_prompt_carries_one_bos_and_the_messages_as_paragraphs(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "How does a file open?"}, {"type": "text", "text": "Explain. "}]
    messages = [{"role": "system", "content": " Be short. "}, {"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>Be short.\nHow does a file open? Explain.\n"
    assert tokenizer.encode(text, add_special_tokens=False).count(BOS) == 1


def test_a_chat_without_generation_prompt_ends_with_its_last_message(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<bos>One.\nTwo."


def test_sampling_defaults_write_varied_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Not a measure of quality: a broken tokenizer, template or weight file would write noise or one word."""
    defaults = model.generation_config
    assert (defaults.do_sample, defaults.temperature, defaults.top_k) == (True, 0.7, 40)
    prompt = torch.tensor([tokenizer.encode("If the file does not exist,")])
    torch.manual_seed(0)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=120, max_new_tokens=120)
    new = output[0, prompt.shape[1] :].tolist()
    words = tokenizer.decode(new, skip_special_tokens=True).split()
    assert len(set(new)) > 30
    assert len(words) > 50
    assert sum(word.strip(".,()'\"").isalpha() for word in words) / len(words) > 0.7


def test_the_notice_names_each_licence_of_the_training_text() -> None:
    notice = (FOLDER / "NOTICE").read_text()
    for licence in ("MIT OR Apache-2.0", "MIT", "PSF-2.0", "BSD-3-Clause", "Apache-2.0"):
        assert f"\n{licence}\n" in notice
