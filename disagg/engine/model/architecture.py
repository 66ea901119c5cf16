"""Which checkpoints can be served, and as which text model. What is not listed was not tested: refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg.engine.model.weights import ModelRefused

# A wrapper's text model under the names it has had: saved by transformers 4, by 5, and as the hub has it.
WRAPPED_TEXT: Mapping[str, str] = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
WRAPPED_MEDIA = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class Architecture:
    """`text_class`: the transformers class that runs it. `renames`: checkpoint name (regex) -> its name."""

    text_class: str
    renames: Mapping[str, str] = field(default_factory=dict)

    def is_expected_extra(self, name: str) -> bool:
        """Whether a tensor that the text model has no use for is just the wrapper's images and sound."""
        return bool(self.renames) and name.removeprefix("model.").startswith(WRAPPED_MEDIA)


TEXT_CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "GptOssForCausalLM",
)
WRAPPERS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma3nForConditionalGeneration": "Gemma3nForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
}
ARCHITECTURES: Mapping[str, Architecture] = {
    **{name: Architecture(name) for name in TEXT_CLASSES},
    **{name: Architecture(text, WRAPPED_TEXT) for name, text in WRAPPERS.items()},
}

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Their angles depend on the length of the sequence so far, so a key computed in one chunk would not fit the next.
REFUSED_ROPE_TYPES = frozenset({"dynamic", "longrope"})


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The entry for config.json's first architecture. Raises ModelRefused."""
    names = config.get("architectures") or ["(none named in config.json)"]
    found = ARCHITECTURES.get(names[0])
    if found is None:
        raise ModelRefused(f"model class `{names[0]}` is not supported; supported are {', '.join(ARCHITECTURES)}")
    return found


def needs_dequantising(config: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether the checkpoint is MXFP4 gpt-oss, the one quantised format served. Raises ModelRefused for others."""
    quantisation = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not quantisation:
        return False
    method = quantisation.get("quant_method", "unknown")
    if method == "mxfp4" and architecture.text_class == "GptOssForCausalLM":
        return True
    raise ModelRefused(f"checkpoint is quantised with `{method}`, which is not supported; use an unquantised one")


def rope_by_layer_type(config: Any) -> dict[str, dict[str, Any]]:
    """RoPE parameters of a built text configuration, by layer type, or under `all`. Raises ModelRefused."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = all(isinstance(value, dict) for value in parameters.values())
    by_type: dict[str, dict[str, Any]] = dict(parameters) if nested else {"all": dict(parameters)}
    for layer_type, rope in by_type.items():
        if rope.get("rope_type") in REFUSED_ROPE_TYPES:
            raise ModelRefused(
                f"RoPE type `{rope['rope_type']}` ({layer_type} layers) is not supported: "
                "its angles change with the sequence's length"
            )
    return by_type


def check_text_config(config: Any) -> None:
    """Refuse what the layers of a supported class may still be set to. Raises ModelRefused."""
    types = set(getattr(config, "layer_types", None) or ())
    for layer_type in sorted(types - SUPPORTED_LAYER_TYPES):
        raise ModelRefused(f"layer type `{layer_type}` is not supported; supported are full and sliding attention")
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise ModelRefused(
            "`use_bidirectional_attention` is set: the model is an encoder, expected a causal language model"
        )
    rope_by_layer_type(config)
