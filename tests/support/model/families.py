"""Every supported family as a tiny random model, saved as the hub ships one; transformers' own answer is the oracle.

Heads are untied and weights have std 0.3: a tied random model repeats one token, and a test on it proves nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from disagg.engine.model.hf import hf_logging
from disagg.engine.model.hf import transformers as hf

hf_logging.disable_progress_bar()  # saving a model of 60 kB draws one otherwise

VOCAB_SIZE = 211
WINDOW = 24
S, F = "sliding_attention", "full_attention"
MAX_POSITIONS = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
SHARED_KV: dict[str, Any] = {
    **BASE,
    "num_hidden_layers": 8,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": [S, S, F, S, F, S, S, F],
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
}


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**BASE))


def _mistral(window: int | None = WINDOW) -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=window, head_dim=16))


def _qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**BASE))


def _qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE, head_dim=16))


def _qwen3_win() -> Any:
    windowed = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE, head_dim=16, **windowed))


def _gemma2() -> Any:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**BASE, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16))


def gemma3_config(**changes: Any) -> Any:
    types = {"layer_types": [S, S, F, S], "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "head_dim": 16}
    return hf.Gemma3TextConfig(**{**BASE, **types, **changes})


def _gemma3() -> Any:
    return hf.Gemma3ForCausalLM(gemma3_config())


def _gemma3n() -> Any:
    own = {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 8}
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**{**SHARED_KV, **own, "intermediate_size": [96] * 8}))


def _gemma4() -> Any:
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARED_KV, global_head_dim=32))


def _gemma4_keqv() -> Any:
    own = {
        "num_hidden_layers": 6,
        "layer_types": [S, S, F, S, S, F],
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    }
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**SHARED_KV, **own}, global_head_dim=32))


def _gpt_oss() -> Any:
    own = {"layer_types": [S, F, S, F], "num_local_experts": 4, "num_experts_per_tok": 2}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**BASE, head_dim=16, sliding_window=WINDOW, **own))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mistral-nowin": lambda: _mistral(None),
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3-win": _qwen3_win,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4-keqv": _gemma4_keqv,
    "gpt_oss": _gpt_oss,
}


def build_family(name: str, *, seed: int = 1) -> Any:
    """The family's model in float32, the same weights for the same seed. Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[name]().eval().float()


def save_family(name: str, folder: Path, *, seed: int = 1) -> Path:
    """`folder` as the hub ships a model: config, safetensors, tokenizer with a chat template."""
    build_family(name, seed=seed).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(folder: Path, *, vocab_size: int = VOCAB_SIZE) -> None:
    """A byte-level tokenizer of `vocab_size` entries: three specials, then bytes as far as they go (ASCII does)."""
    specials = ["<pad>", "<bos>", "<eos>"]
    # Byte-level characters beyond ASCII's stand last, so that a small vocabulary loses only some non-ASCII bytes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (0x7F <= ord(c) < 0x100 or ord(c) > 0x121, c))
    vocab = {token: i for i, token in enumerate([*specials, *alphabet][:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Reference:
    """What transformers generates: the answer's ids, per step the five likeliest (id, logprob), the least top-2 gap.

    `min_expert_gap` is the least distance between the last expert chosen and the first one left out; infinite without
    experts.
    """

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    min_gap: float
    min_expert_gap: float


@contextmanager
def expert_gaps(model: Any) -> Iterator[list[float]]:
    """Collects, per call of each expert router, the least gap between the scores of the k-th and the next expert."""
    gaps: list[float] = []

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        scores, num_chosen = output[0], output[2].shape[-1]
        ranked = scores.float().sort(-1, descending=True).values
        gaps.append(float((ranked[..., num_chosen - 1] - ranked[..., num_chosen]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    hooks = [router.register_forward_hook(look) for router in routers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def reference_generate(model: Any, prompt: Sequence[int], num_tokens: int) -> Reference:
    """Greedy, float32, transformers' eager attention and its own cache. Puts the model's attention back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with expert_gaps(model) as gaps:
            output = model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        model.set_attn_implementation(before)
    logprobs = torch.stack(output.logits)[:, 0].float().log_softmax(-1)
    values, ids = logprobs.topk(5, -1)
    top = tuple(tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    token_ids = tuple(output.sequences[0, len(prompt) :].tolist())
    min_gap = float((values[:, 0] - values[:, 1]).min())
    return Reference(tuple(prompt), token_ids, top, min_gap, min(gaps, default=math.inf))


MIN_GAP = 5e-3
"""Below this a top-2 gap is a near-tie that the order of additions may decide (batch shapes spread logits by 1e-3)."""
MIN_EXPERT_GAP = 1e-5
"""Below this the order of additions may send a token to another expert, which moves logprobs by tenths and seldom an
id (seen at 3e-6 on a processor with AVX-512). Scores of these models spread by a tenth of it."""
MAX_RESEEDS = 20


def safe_prompts(model: Any, lengths: Sequence[int], num_tokens: int, *, seed: int = 3) -> list[Reference]:
    """A random prompt of each length on whose answer the reference has no near-tie; reseeds, bounded, and says so."""
    return [_safe_prompt(model, length, num_tokens, seed) for length in lengths]


def _safe_prompt(model: Any, length: int, num_tokens: int, seed: int) -> Reference:
    for attempt in range(MAX_RESEEDS):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + length * 1009 + attempt)
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        reference = reference_generate(model, prompt, num_tokens)
        if reference.min_gap >= MIN_GAP and reference.min_expert_gap >= MIN_EXPERT_GAP:
            if attempt:
                print(f"prompt of {length} tokens: reseeded {attempt} times to avoid near-ties")
            return reference
    raise AssertionError(f"no prompt of {length} tokens without a near-tie in {MAX_RESEEDS} seeds")
