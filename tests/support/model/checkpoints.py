"""Fabricated checkpoints: the forms in which the hub ships models, at the size of a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.model.families import BASE, build_family, gemma3_config, save_tokenizer

from disagg.engine.model.hf import transformers as hf


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if key not in changes or item is not None}))


def shard(folder: Path, num_shards: int, *, order: int = 1) -> None:
    """Split model.safetensors over shards with an index. `order` -1 deals the tensors the other way round."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[::order][number::num_shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_gemma3_wrapper(folder: Path) -> Any:
    """`Gemma3ForConditionalGeneration` with a small vision tower; its text model, to compare with."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=gemma3_config().to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = hf.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def wrap_text_model(folder: Path, class_name: str, model_type: str) -> None:
    """Turn a saved text model into the multimodal wrapper's form: nested configuration, longer names, media tensors."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    renamed |= {f"model.{part}.weight": torch.zeros(3) for part in ("vision_tower", "audio_tower", "embed_vision")}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    wrapper = {"architectures": [class_name], "model_type": model_type, "dtype": text["dtype"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(wrapper))


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of E2M1 by the low three bits (OCP Microscaling Formats 1.0, section 5.3.3); the fourth is the sign."""


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 as defined: `blocks` `[..., groups, 16]` hold two values a byte, low nibble first; scale 2**(s - 127)."""
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.array(FP4)[nibbles & 7] * np.where(nibbles & 8, -1.0, 1.0)
    return (values * 2.0 ** (scales.astype(np.float64)[..., None] - 127)).reshape(*blocks.shape[:-2], -1)


def save_mxfp4_gpt_oss(folder: Path) -> Mapping[str, np.ndarray]:
    """gpt-oss with experts in MXFP4, as the hub ships it; the experts' weights by name, as they should be read."""
    build_family("gpt_oss").to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape  # transformers: [experts, in, out]; MXFP4: out, in
        blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16), dtype=np.uint8)
        scales = rng.integers(121, 125, (experts, columns, rows // 32), dtype=np.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = torch.from_numpy(blocks), torch.from_numpy(scales)
        expected[name] = dequantise(blocks, scales).swapaxes(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit_json(folder / "config.json", quantization_config=quantisation)
    return expected


def save_other_architecture(folder: Path, class_name: str, model_type: str) -> None:
    """Just enough of a folder for its architecture to be looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**BASE, "architectures": [class_name], "model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
