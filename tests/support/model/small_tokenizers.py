"""Small tokenizers of the kinds that models have, and folders as the hub ships them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import disagg

DEMO_FOLDER = Path(disagg.__file__).parent / "demo_model"
TEXT = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "a stop string splits over tokens"]
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """The demo model's, without what adds BOS; GPT-2's and Llama 3's are of this kind."""
    content = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps({**content, "post_processor": None}))


def byte_fallback() -> Tokenizer:
    """As Llama 2's, Mistral's and Gemma's: spaces as `▁`, unknown characters as `<0xNN>` tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIALS, *byte_tokens], show_progress=False)
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXT, trainer)
    # The trainer marks byte tokens as special; in the models they are ordinary vocabulary.
    content = json.loads(trained.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIALS]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5's: a unigram vocabulary whose decoder drops the first space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def add_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """With a post-processor that adds BOS, as Llama's and Gemma's have."""
    template = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=template)
    return tokenizer


def write_folder(
    folder: Path, tokenizer: Tokenizer, *, config: dict[str, Any] | None = None, files: dict[str, str] | None = None
) -> Path:
    """A model folder without weights: what the HTTP layer reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder
