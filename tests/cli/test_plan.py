"""`disagg plan` against an oracle that walks token positions and knows transformers' modules, not disagg."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.families import BASE, FAMILIES, MAX_POSITIONS, build_family
from support.oracles.token_walk import attends, needed_blocks

from disagg.cache.layout import LayerSpec, derive_layout
from disagg.cli.main import main, spell_out
from disagg.config.demo import demo_model_folder
from disagg.engine.footprint import footprint
from disagg.engine.model.hf import transformers as hf

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@cache
def save_config(name: str, folder: Path) -> Path:
    """A folder with config.json and nothing else."""
    model = build_family(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / name)
    assert [path.name for path in (folder / name).iterdir() if path.suffix != ".json"] == []
    return folder / name


@cache
def layer_facts(name: str) -> tuple[dict[tuple[Any, int, int], list[int]], dict[int, int]]:
    """From the built modules: owning layers by (window, kv heads, head dim), and who reads whose KV."""
    model = build_family(name)
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ] * len(model.model.layers)
    groups: dict[tuple[Any, int, int], list[int]] = defaultdict(list)
    producers = {}
    last_of_type: dict[str, int] = {}
    for index, (kind, layer) in enumerate(zip(types, model.model.layers, strict=True)):
        attention = layer.self_attn
        if getattr(attention, "is_kv_shared_layer", False):
            producers[index] = last_of_type[kind]
            continue
        last_of_type[kind] = index
        window = config.sliding_window if kind == "sliding_attention" else None
        groups[window, attention.k_proj.out_features // attention.head_dim, attention.head_dim].append(index)
    return groups, producers


def test_a_budget_says_what_is_left_for_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--budget", "8GiB", "--max-num-seqs", "1"]) == 0
    poor = capsys.readouterr().out
    assert "give `--max-num-seqs` 2 or more" in poor
    assert main(["plan", "--budget", "8GiB"]) == 0
    rich = capsys.readouterr().out
    for shown in (poor, rich):
        assert "for prefixes beside one running sequence: " in shown
    assert "note:" not in rich


def test_what_steps_take_of_a_gpu_is_said_by_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "a prefill worker on a GPU takes" in shown
    assert "a decode worker on a GPU takes" in shown
    plain, pieces, eager = (
        run(demo_model_folder(), *flags)["gpu_steps"] for flags in ((), ("--piecewise-graphs",), ("--enforce-eager",))
    )
    assert plain["prefill"]["decode_graphs"] == plain["prefill"]["pieces"] == 0 < plain["decode"]["decode_graphs"]
    assert pieces["prefill"]["pieces"] > 0
    assert eager["decode"]["total"] < plain["decode"]["total"] < pieces["decode"]["total"]


def walk(window: int | None, prompt_len: int, block_size: int, cached: int) -> tuple[set[int], set[int], set[int]]:
    """(ordinals that must move, live when the prompt is computed, scratch when it is one step)."""
    complete = {token // block_size for token in range(cached) if (token + 1) % block_size == 0}
    num_blocks = (prompt_len - 1) // block_size + 1
    live = set()
    for ordinal in range(num_blocks):
        tokens = range(ordinal * block_size, (ordinal + 1) * block_size)
        queries = range(prompt_len, prompt_len + block_size + (window or 1))
        if any(attends(max(query, token), token, window) for token in tokens for query in queries):
            live.add(ordinal)
    return needed_blocks(prompt_len, window, block_size) - complete, live, set(range(num_blocks)) - live


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_the_json_equals_a_walk_over_tokens(name: str, folder: Path, data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 4, 8, 16]))
    prompt_len = data.draw(st.integers(1, 150))
    groups, producers = layer_facts(name)
    path = save_config(name, folder)
    cached = {group: data.draw(st.integers(0, prompt_len)) for group in group_names(path)}
    flags = [f"--cached={group}={count}" for group, count in cached.items()]
    body = run(path, "--prompt-len", str(prompt_len), "--block-size", str(block_size), "--swa-scratch", *flags)
    assert (body["block_size"], body["prompt_len"]) == (block_size, prompt_len)
    assert {(g["window"], g["kv_heads"], g["head_dim"]): g["layers"] for g in body["groups"]} == groups
    moved = full = 0
    for found in body["groups"]:
        slot_bytes = len(found["layers"]) * 2 * found["kv_heads"] * block_size * found["head_dim"] * 4
        required, live, scratch = walk(found["window"], prompt_len, block_size, cached[found["name"]])
        num_blocks = (prompt_len - 1) // block_size + 1
        is_legal = not set(producers.values()) & set(found["layers"][:-1])
        assert found["slot_bytes"] == slot_bytes
        assert (found["dtype"], found["sink_tokens"]) == ("float32", 0)  # no supported class has sink tokens
        assert found["required_blocks"] == sorted(required)
        assert found["cached_tokens"] == cached[found["name"]] // block_size * block_size
        assert found["bytes"] == len(required) * slot_bytes
        assert found["full_copy_bytes"] == num_blocks * slot_bytes
        assert found["live_slots"] == len(live)
        expected_scratch = -(-len(scratch) // len(found["layers"])) if is_legal else 0
        assert found["scratch_slots"] == expected_scratch
        moved, full = moved + found["bytes"], full + found["full_copy_bytes"]
    assert (body["bytes"], body["full_copy_bytes"]) == (moved, full)


@cache
def group_names(folder: Path) -> list[str]:
    return [group["name"] for group in run(folder, "--prompt-len", "1")["groups"]]


def run(folder: Path, *flags: str) -> Any:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["plan", "--model", str(folder), "--dtype", "float32", "--json", *flags]) == 0
    return json.loads(out.getvalue())


KEYS = {"block_size", "prompt_len", "groups", "bytes", "full_copy_bytes", "gpu_steps"}
GROUP_KEYS = {
    *("name", "window", "sink_tokens", "layers", "kv_heads", "head_dim", "dtype", "slot_bytes"),
    *("required_blocks", "cached_tokens", "bytes", "full_copy_bytes", "live_slots", "scratch_slots"),
}
BUDGET_KEYS = {
    *("budget", "max_model_len", "max_num_batched_tokens", "sequences"),
    *("default_max_num_batched_tokens", "default_sequences", "sequences_by_length"),
    *("max_num_seqs", "reuse", "reuse_advice"),
}


def test_the_json_has_these_keys_and_no_others(folder: Path) -> None:
    path = save_config("gemma3", folder)
    body = run(path, "--prompt-len", "100")
    assert set(body) == KEYS
    assert [set(group) for group in body["groups"]] == [GROUP_KEYS, GROUP_KEYS]
    with_budget = run(path, "--prompt-len", "100", "--budget", "8MiB")
    assert set(with_budget) == KEYS | {"budgets"}
    assert [set(one) for one in with_budget["budgets"]] == [BUDGET_KEYS]
    assert {key: with_budget[key] for key in KEYS} == body


@pytest.mark.parametrize("given", ["bfloat16", "fp8_e4m3"])
def test_the_dtype_is_that_of_the_cache(given: str, folder: Path) -> None:
    body = run(save_config("gemma3", folder), "--kv-cache-dtype", given)
    assert {group["dtype"] for group in body["groups"]} == {"bfloat16" if given == "bfloat16" else "float8_e4m3fn"}


def test_sink_tokens_and_the_blocks_that_they_keep_are_shown() -> None:
    layers = [LayerSpec(i, 128, 32, 2, 16, "float32", i) for i in range(32)]
    layout = derive_layout(layers, block_size=32, max_model_len=4096, uses_scratch=True)
    (group,) = footprint(layout, 1024, cached_tokens={}, swa_scratch="on").as_json()["groups"]
    assert group["sink_tokens"] == 32
    assert group["required_blocks"] == (0, 28, 29, 30, 31)
    assert (group["live_slots"], group["scratch_slots"]) == (5, 1)


def test_the_walk_can_fail() -> None:
    """Negative control: a window off by one moves another block at a boundary."""
    assert walk(24, 32, 8, 0) != walk(25, 33, 8, 0)


def test_a_prompt_of_1024_over_32_windowed_layers_takes_five_slots_with_scratch() -> None:
    layers = [LayerSpec(i, 128, 0, 2, 16, "float32", i) for i in range(32)]
    layout = derive_layout(layers, block_size=32, max_model_len=4096, uses_scratch=True)
    found = footprint(layout, 1024, cached_tokens={}, swa_scratch="on")
    assert (found.groups[0].live_slots, found.groups[0].scratch_slots) == (4, 1)


def test_reuse_keeps_what_on_puts_into_scratch_slots(folder: Path) -> None:
    """Of 32 tokens block 0 is stale at the end, but not at 24, where the same prompt would begin to compute."""
    path = save_config("gemma3", folder)
    flags = ("--prompt-len", "32", "--block-size", "8")
    found = {mode: run(path, *flags, f"--swa-scratch={mode}")["groups"] for mode in ("off", "on", "reuse")}
    assert {mode: groups[0]["scratch_slots"] for mode, groups in found.items()} == {"off": 0, "on": 1, "reuse": 0}


FLAGS = ("--dtype", "float32", "--prompt-len", "100", "--block-size", "8", "--cached", "full=40")


def test_the_table_shows_runs_of_blocks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_config("gemma3", folder)
    assert main(["plan", "--model", str(path), *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert "5-12" in shown
    assert "100 tokens in blocks of 8: 40 KiB move, a full copy moves 104 KiB" in shown


def save_budget_model(folder: Path) -> Path:
    """100 KiB per token in layers of window 1024 and 40 KiB in full ones: 40 and 16 layers of 5 heads x 128."""
    types = ["sliding_attention"] * 40 + ["full_attention"] * 16
    sizes = {
        "num_hidden_layers": 56,
        "hidden_size": 320,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 128,
    }
    config = hf.Gemma3TextConfig(
        **{**BASE, **sizes, "max_position_embeddings": 8192}, layer_types=types, sliding_window=1024
    )
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def test_a_budget_seats_what_the_published_example_seats(tmp_path: Path) -> None:
    body = run(save_budget_model(tmp_path), "--block-size", "32", "--budget", "70GiB")
    assert [g["slot_bytes"] // 32 for g in body["groups"]] == [200 << 10, 80 << 10]
    half = run(tmp_path, "--block-size", "32", "--dtype", "bfloat16", "--budget", "70GiB", "--budget", "140GiB")
    assert [g["slot_bytes"] // 32 for g in half["groups"]] == [100 << 10, 40 << 10]
    seats = [(one["sequences"], one["sequences_by_length"]) for one in half["budgets"]]
    assert seats[0] == (169, 64)
    assert seats[1][0] >= 2 * 169
    stepped = run(
        tmp_path, "--block-size", "32", "--dtype", "bfloat16", "--budget", "70GiB", "--max-num-batched-tokens", "2048"
    )
    assert stepped["budgets"][0]["sequences"] == 168
    steps = [(one["max_num_batched_tokens"], one["default_max_num_batched_tokens"]) for one in half["budgets"]]
    assert steps == [(0, 512), (0, 512)]
    assert stepped["budgets"][0]["max_num_batched_tokens"] == 2048
    assert [one["default_sequences"] for one in (half["budgets"][0], stepped["budgets"][0])] == [169, 169]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "169 sequences of 8192 tokens without room for a prefill step, 169 with a worker's default steps of 512;"),
        (
            ("--max-num-batched-tokens", "2048"),
            "168 sequences of 8192 tokens with room for steps of 2048 prompt tokens, 169 with a worker's default",
        ),
    ],
)
def test_the_line_says_which_step_was_counted(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_budget_model(tmp_path)
    own = ("--block-size", "32", "--dtype", "bfloat16", "--budget", "70GiB")
    assert main(["plan", "--model", str(path), *own, *flags]) == 0
    assert f"70 GiB seats {words}" in capsys.readouterr().out


def test_the_least_memory_that_a_worker_starts_with_seats_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_config("gemma3", folder)
    own = ("--block-size", "8", "--max-model-len", "256")
    assert main(["plan", "--model", str(path), "--dtype", "float32", *own, "--budget", "1KiB"]) == 2
    least = int(capsys.readouterr().err.partition("needs ")[2].partition(";")[0])
    counts = []
    for budget, step in ((least, "512"), (least - 1, "8")):
        flags = ("--budget", str(budget), "--max-num-batched-tokens", step)
        (one,) = run(path, *own, *flags)["budgets"]
        counts.append((one["sequences"] > 0, one["default_sequences"]))
    assert counts == [(True, 1), (True, 0)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cached", "window-9=3"], "`window-9` is no layer group of this model, which has window-24, full"),
        (["--prompt-len", "10", "--cached", "full=11"], "`full=11`: the prompt has 10 tokens"),
        (["--cached", "full"], "`--cached` is `full`: expected GROUP=TOKENS"),
        (["--prompt-len", "513"], f"`--prompt-len` is `513`: a sequence has at most {MAX_POSITIONS}"),
        (["--max-model-len", "600"], "made for at most 512"),
        (["--dtype", "auto"], "names no dtype: give one with `--dtype`"),
        (["--block-size", "24"], "expected a power of two"),
        (["--budget", "much"], "`--budget` is `much`: expected bytes"),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_config("gemma3", folder)
    assert main(["plan", "--model", str(path), "--dtype", "float32", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err


def test_a_bare_swa_scratch_means_on() -> None:
    assert spell_out(["prefill", "--swa-scratch"]) == ["prefill", "--swa-scratch=on"]
    assert spell_out(["plan", "--swa-scratch", "--json"]) == ["plan", "--swa-scratch=on", "--json"]
    assert spell_out(["plan", "--swa-scratch", "reuse"]) == ["plan", "--swa-scratch", "reuse"]
    assert spell_out(["plan", "--swa-scratch=off"]) == ["plan", "--swa-scratch=off"]
