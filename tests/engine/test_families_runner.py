"""Every family through Runner and KVCache answers as transformers' own generate does."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.model.continuous import Live, greedy, largest_error, make_cache
from support.model.families import FAMILIES, WINDOW, Reference, safe_prompts, save_family

from disagg.engine.model import attention
from disagg.engine.model import packed_linear as packed
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.model.packed_linear import pack_linears
from disagg.engine.run.runner import Runner
from disagg.kernels import native_attention
from disagg.kernels.dispatch import CALLS

BLOCK_SIZE = 8
NUM_TOKENS = 20
# Around the window, around blocks, one token, and several windows (three chunks of 37).
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * BLOCK_SIZE - 1, 4 * BLOCK_SIZE + 1, 3 * WINDOW + 17)
LOGPROB_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


@cache
def load_case(name: str, folder: Path) -> tuple[LoadedModel, tuple[Reference, ...]]:
    model = load_model(save_family(name, folder / name))
    return model, tuple(safe_prompts(model.module, LENGTHS, NUM_TOKENS))


def answers(model: LoadedModel, references: tuple[Reference, ...], **options: int) -> list[Live]:
    runner = Runner(model, make_cache(model, block_size=options.get("block_size", BLOCK_SIZE), num_slots=140))
    prompts = [reference.prompt for reference in references]
    lives = greedy(runner, prompts, NUM_TOKENS, chunk=options.get("chunk", 37))
    assert all(pool.num_used == 0 for pool in runner.cache.pools)
    runner.cache.close()
    return lives


def num_equal(lives: list[Live], references: tuple[Reference, ...]) -> int:
    return sum(live.answer == reference.token_ids for live, reference in zip(lives, references, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_prefill_mixed_with_decode_answers_as_transformers_does(name: str, folder: Path) -> None:
    model, references = load_case(name, folder)
    assert len({token for reference in references for token in reference.token_ids}) > 20, "the answers say nothing"
    CALLS.clear()
    lives = answers(model, references)
    assert (CALLS[native_attention.ATTENTION] > 0) == native_attention.is_loaded()
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_operations_alone_answer_as_transformers_does(name: str, folder: Path) -> None:
    """What serves where the compiled helper is missing."""
    model, references = load_case(name, folder)
    CALLS.clear()
    with native_attention.left_out():
        lives = answers(model, references)
    assert not [call for call in CALLS if call.startswith("native:")]
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_linear_layers_answer_as_transformers_does(name: str, folder: Path) -> None:
    model, references = load_case(name, folder)
    fast = replace(model, module=deepcopy(model.module))
    count = pack_linears(fast.module)
    assert count >= 4 * len(model.layers), "nothing was packed"
    CALLS.clear()
    lives = answers(fast, references[2:])
    assert CALLS["packed_linear"] > count, "the packed layers did not run"
    for live, reference in zip(lives, references[2:], strict=True):
        assert live.answer == reference.token_ids, f"prompt of {len(reference.prompt)} tokens"
        assert largest_error(live, reference) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_supported", [True, False])
def test_a_model_of_sixteen_bits_answers_whether_or_not_its_layers_can_be_packed(
    dtype: str, is_supported: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AVX2 machine has neither bfloat16 nor float16 in oneDNN, one with AVX-512 often the first alone."""
    _, references = load_case("gemma3", folder)
    if not is_supported:
        for question in packed.SUPPORT.values():
            monkeypatch.setattr(torch.ops.mkldnn, question, lambda: False)
    model = load_model(folder / "gemma3", dtype=dtype)
    count = pack_linears(model.module)
    assert (count > 0) == packed.can_pack(getattr(torch, dtype))
    assert is_supported or count == 0
    CALLS.clear()
    lives = answers(model, references[2:4])
    assert (CALLS["packed_linear"] > 0) == (count > 0)
    for live, reference in zip(lives, references[2:4], strict=True):
        first = Live(live.sequence, [], 0, rows=live.rows[:1])
        assert largest_error(first, replace(reference, top_logprobs=reference.top_logprobs[:1])) < 0.2


def test_a_runner_says_who_attends_and_who_writes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "disagg.engine.run.runner")
    model, _ = load_case("gemma3", folder)
    made = make_cache(model, block_size=8, num_slots=20)
    Runner(model, made)
    with native_attention.left_out():
        Runner(model, made)
    told = [record.getMessage() for record in caplog.records]
    if native_attention.is_loaded():
        assert told[0] == "decode attention: the compiled helper; KV writes: the compiled helper"
    assert told[1].startswith("decode attention and KV writes: torch operations; the compiled helper is not built")


@pytest.mark.parametrize(("block_size", "chunk"), [(1, 64), (5, 7), (16, 512)])
def test_block_and_chunk_sizes_do_not_change_answers(block_size: int, chunk: int, folder: Path) -> None:
    model, references = load_case("gemma3", folder)
    some = references[2:]
    runner = Runner(model, make_cache(model, block_size=block_size, num_slots=800 // block_size + 20))
    lives = greedy(runner, [reference.prompt for reference in some], NUM_TOKENS, chunk=chunk)
    assert num_equal(lives, some) == len(some)


def test_blocks_out_of_the_window_are_reused_while_their_sequence_runs(folder: Path) -> None:
    model, references = load_case("mistral", folder)
    long = references[-1:]
    # 89 tokens and 20 more span 14 blocks; a window of 24 and a chunk of 8 hold 5 at once, two slots are reserved.
    runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=2 + 5))
    lives = greedy(runner, [long[0].prompt], NUM_TOKENS, chunk=8)
    assert num_equal(lives, long) == 1


def test_a_sequence_that_holds_nan_leaves_the_others_alone(folder: Path) -> None:
    model, references = load_case("gemma3", folder)
    prompts = [references[1].prompt, references[3].prompt]
    embedding = model.module.get_input_embeddings()
    poisoned = next(token for token in range(200) if token not in {*references[1].prompt, *references[1].token_ids})
    before = embedding.weight[poisoned].clone()
    with torch.no_grad():
        embedding.weight[poisoned] = float("nan")
    try:
        runner = Runner(model, make_cache(model, block_size=BLOCK_SIZE, num_slots=60))
        lives = greedy(runner, [prompts[0], [*prompts[1], poisoned]], NUM_TOKENS, chunk=37)
    finally:
        with torch.no_grad():
            embedding.weight[poisoned] = before
    assert lives[0].answer == references[1].token_ids
    assert not lives[1].rows[0].isfinite().any()


# --- negative controls: the comparison above must be able to fail ---------------------------------------------


def test_a_window_off_by_one_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, references = load_case("gemma3", folder)
    wrong = replace(model, layers=tuple(replace(x, window=x.window and x.window + 1) for x in model.layers))
    with pytest.raises(attention.WindowMismatch, match="window 24, laid out for 25"):
        answers(wrong, references)
    exact = attention.paged_attention

    def lying(*args: object, sliding_window: int | None = None, **kwargs: object) -> object:
        return exact(*args, sliding_window=sliding_window and sliding_window + 1, **kwargs)  # type: ignore[arg-type]

    hide_attention(monkeypatch, lying)
    assert num_equal(answers(wrong, references), references) < len(references) // 2


@pytest.mark.parametrize(("name", "argument"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_ignoring_sink_logits_or_softcap_is_noticed(
    name: str, argument: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, references = load_case(name, folder)
    exact = attention.paged_attention
    hide_attention(monkeypatch, lambda *args, **kwargs: exact(*args, **{**kwargs, argument: None}))
    assert num_equal(answers(model, references), references) < len(references)


def hide_attention(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    from disagg.engine.model.hf import ATTENTION_NAME, transformers

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, ATTENTION_NAME, function)
