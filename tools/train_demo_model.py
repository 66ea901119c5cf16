"""Train a small Gemma-3-architecture model like the bundled one, from documentation found on this machine.

    .venv/bin/python tools/train_demo_model.py /tmp/model /usr/share/doc .venv/lib --minutes 30

The result is an ordinary HF folder. What it learns is the voice of the text it is given, so give it prose whose
licence lets you publish the result, and write that licence down.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from prose import gather
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

CHAT_TEMPLATE = Path(__file__).resolve().parents[1] / "disagg" / "demo_model" / "chat_template.jinja"
PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"  # ids 0, 1, 2: the defaults of Gemma 3
WARMUP_STEPS = 50
CONSTANT_PART = 0.15  # of the run at the full rate; the rest falls linearly to zero, where most of the loss is won
LEARNING_RATE = 3e-3
HELD_OUT_PART = 0.02


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text is encoded without loss. Encoding puts BOS first, as Gemma's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> torch.Tensor:
    """All documents as one int64 stream, each between BOS and EOS."""
    eos = tokenizer.token_to_id(EOS)
    ids = [token for encoding in tokenizer.encode_batch(list(documents)) for token in (*encoding.ids, eos)]
    return torch.tensor(ids)


def model_config(vocab_size: int) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        max_position_embeddings=4096,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


@dataclass(frozen=True)
class Budget:
    """When training ends: after `steps`, or after `seconds` where `steps` is None. A rate schedule needs to know."""

    steps: int | None
    seconds: float

    def progress(self, step: int, elapsed_s: float) -> float:
        """0 at the start, 1 at the end."""
        return min(1.0, step / self.steps if self.steps else elapsed_s / self.seconds)


def rate(step: int, progress: float) -> float:
    """Learning rate at `step`, as a part of the full one."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (1 - progress) / (1 - CONSTANT_PART))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed_tokens" not in name]
    rest = [weight for name, weight in named if weight.ndim != 2 or "embed_tokens" in name]
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of int64 `batch` [B, L + 1]: each token from those before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: torch.Tensor, length: int) -> float:
    rows = stream[: (len(stream) - 1) // length * length + 1].unfold(0, length + 1, length)
    if not len(rows):
        return float("nan")
    return torch.stack([loss_of(model, part) for part in torch.split(rows[:200], 10)]).mean().item()


def train(
    model: nn.Module,
    stream: torch.Tensor,
    *,
    budget: Budget,
    batch_size: int,
    length: int,
    report: Callable[[int, float, float], None],
) -> int:
    """Train on windows of `length` tokens at random offsets of `stream`; the number of steps taken."""
    optimizers = make_optimizers(model)
    started, step = time.monotonic(), 0
    while (progress := budget.progress(step, time.monotonic() - started)) < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate(step, progress)
        offsets = torch.randint(len(stream) - length, (batch_size,)).tolist()
        loss = loss_of(model, torch.stack([stream[at : at + length + 1] for at in offsets]))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        report(step, progress, loss.item())
    return step


def save(model: Gemma3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_sliding_window_pattern", None)  # a private default of the class; the layer types are all written out
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    # Greedy decoding of so small a model soon repeats itself.
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 40}
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    shutil.copy(CHAT_TEMPLATE, folder)
    write_json(folder / "config.json", config)
    version = {"transformers_version": config["transformers_version"]}
    write_json(folder / "generation_config.json", {**ids, **sampling, **version})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("text", type=Path, nargs="+", help="files or folders with .md .rst .txt .html .py")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run [30]")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of --minutes")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    documents = gather(options.text)
    if not documents:
        log(f"error: no prose in {', '.join(map(str, options.text))}: name folders with documentation")
        return 2
    num_held_out = max(1, round(len(documents) * HELD_OUT_PART))
    order = [documents[i] for i in torch.randperm(len(documents)).tolist()]
    log(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB; training the tokenizer")
    tokenizer = train_tokenizer(order[num_held_out:], options.vocab_size)
    stream, held_out = encode(tokenizer, order[num_held_out:]), encode(tokenizer, order[:num_held_out])
    length = options.sequence_length
    if len(stream) <= length + 1:
        log(f"error: {len(stream)} tokens in all: give text for more than --sequence-length {length} tokens")
        return 2
    model = Gemma3ForCausalLM(model_config(tokenizer.get_vocab_size()))
    log(f"{len(stream) / 1e6:.2f} M tokens, {sum(weight.numel() for weight in model.parameters())} parameters")

    def report(step: int, progress: float, loss: float) -> None:
        if step % 20 == 0:
            log(f"{progress:4.0%}  step {step}  loss {loss:.3f}")

    budget = Budget(options.steps, options.minutes * 60)
    steps = train(model, stream, budget=budget, batch_size=options.batch_size, length=length, report=report)
    log(f"{steps} steps, held-out loss {held_out_loss(model, held_out, length):.3f} per token")
    save(model, tokenizer, options.out)
    log(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
