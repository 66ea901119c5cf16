"""Every family through router, prefill worker, transfer and decode worker, against transformers' own `generate`."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import FAMILIES, VOCAB_SIZE, WINDOW, Reference, build_family, safe_prompts, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

from disagg.cli.main import main

pytestmark = pytest.mark.processes

MAX_MODEL_LEN = 256
NUM_TOKENS = 12
# around the window (24), around blocks of 4 and 8, several windows
LENGTHS = (5, 7, 8, 9, 23, 24, 25, 31, 32, 33, 70, 97)
CHUNK = 37  # a prime: chunks start inside blocks
FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", str(CHUNK)),
)


SCRATCHED = ("gemma3", "gemma3n", "gemma4", "gpt_oss")
"""Served with scratch slots: chunks of 37 outdate blocks of a window of 24. What moves must not change by that."""
BLOCK_SIZES = (4, 8)
"""Drawn by the family's name. Blocks of 16 would be too long for this window: a chunk would outdate none of its own."""
PLANNED_LENGTHS = (25, 97)
"""Prompts whose record is compared with what `disagg plan` says: within a window and a block of it, and far past."""


@dataclass(frozen=True)
class Case:
    name: str
    block_size: int
    system: System
    folder: Path
    layers: list[StoredLayer]
    references: list[Reference]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder: Path = save_family(request.param, tmp_path_factory.mktemp(request.param))
    model = build_family(request.param)
    references = safe_prompts(model, LENGTHS, NUM_TOKENS)
    scratch = ("--swa-scratch",) if request.param in SCRATCHED else ()
    block_size = random.Random(request.param).choice(BLOCK_SIZES)
    print(f"{request.param}: blocks of {block_size}")
    with running("--model", str(folder), "--block-size", str(block_size), *FLAGS, *scratch) as system:
        yield Case(request.param, block_size, system, folder, stored_layers(model, itemsize=4), references)


def ask(system: System, reference: Reference) -> Any:
    status, body = system.complete(
        list(reference.prompt),
        request_id=f"p{len(reference.prompt)}",
        max_tokens=NUM_TOKENS,
        temperature=0,
        ignore_eos=True,
        logprobs=5,
        return_tokens_as_token_ids=True,
    )
    assert status == 200, body
    return body["choices"][0]


def moved_by_window(record: Any) -> Counter[int | None]:
    moved: Counter[int | None] = Counter()
    for group in record["transfer"]["groups"]:
        window = re.match(r"window-(\d+)", group["name"])
        moved[int(window[1]) if window else None] += group["nbytes"]
    return moved


def planned(case: Case, prompt_len: int, *flags: str) -> Any:
    """`disagg plan --json` for such a prompt, from config.json alone."""
    out = io.StringIO()
    own = ("--dtype", "float32", "--block-size", str(case.block_size), "--max-model-len", str(MAX_MODEL_LEN))
    with contextlib.redirect_stdout(out):
        assert main(["plan", "--model", str(case.folder), "--prompt-len", str(prompt_len), "--json", *own, *flags]) == 0
    return json.loads(out.getvalue())


def assert_moved_as_planned(record: Any, plan: Any, said: str) -> None:
    """Blocks and bytes of each group; a record leaves groups out of which nothing moved."""
    moved = {group["name"]: (group["num_blocks"], group["nbytes"]) for group in record["transfer"]["groups"]}
    expected = {g["name"]: (len(g["required_blocks"]), g["bytes"]) for g in plan["groups"] if g["bytes"]}
    assert {name: figures for name, figures in moved.items() if figures != (0, 0)} == expected, said
    assert record["transfer"]["nbytes"] == plan["bytes"], said
    assert record["transfer"]["full_copy_nbytes"] == plan["full_copy_bytes"], said


def test_tokens_equal_transformers_and_bytes_equal_the_minimum(case: Case) -> None:
    system = case.system
    with ThreadPoolExecutor(len(case.references)) as pool:
        choices = list(pool.map(lambda reference: ask(system, reference), case.references))
    total = 0
    for reference, choice in zip(case.references, choices, strict=True):
        prompt_len = len(reference.prompt)
        same(tuple(choice["token_ids"]), reference.token_ids, f"prompt of {prompt_len}")
        for step, top in zip(choice["logprobs"]["top_logprobs"], reference.top_logprobs, strict=True):
            values = {int(name.removeprefix("token_id:")): value for name, value in step.items()}
            likeliest = top[:-1]  # fifth and sixth may be a near-tie; every value is compared, not who comes last
            assert [values[token_id] for token_id, _ in likeliest] == pytest.approx([v for _, v in likeliest], abs=2e-3)
            assert sorted(values.values(), reverse=True) == pytest.approx([v for _, v in top], abs=2e-3)
        record = system.record(f"p{prompt_len}")
        expected_nbytes = minimum_nbytes(case.layers, prompt_len, case.block_size)
        assert moved_by_window(record) == expected_nbytes, f"prompt of {prompt_len}"
        assert record["transfer"]["nbytes"] == sum(expected_nbytes.values()) > 0
        if prompt_len in PLANNED_LENGTHS:
            assert_moved_as_planned(record, planned(case, prompt_len), f"prompt of {prompt_len}")
        total += record["transfer"]["nbytes"]
    system.settle()
    system.wait_until_idle()
    assert system.total("disagg_transfer_bytes_total", outcome="verified") == total
    assert system.total("disagg_transfer_bytes_total") == total
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == 0
    assert system.total("disagg_prompt_tokens_computed_total", worker="prefill-0") == sum(LENGTHS)
    pids = {worker["pid"] for worker in system.workers()} | {system.pid_of("router")}
    assert len(pids) == 3


def tokens(dice: random.Random, count: int) -> list[int]:
    return [dice.randrange(3, VOCAB_SIZE) for _ in range(count)]


def ask_for_two(system: System, prompt: list[int], name: str) -> Any:
    """The record of a short answer: of one token, no KV would move."""
    status, body = system.complete(prompt, request_id=name, max_tokens=2, temperature=0, ignore_eos=True)
    assert status == 200, body
    return system.record(name)


def assert_second_moves_as_planned(case: Case, first: list[int], second: list[int], full: int, windowed: int) -> None:
    """`full`, `windowed`: tokens of the second prompt that the decode worker has in such groups, from the first."""
    said = f"{case.name}: {len(first)} tokens, then {len(second)} with {full} and {windowed} held"
    print(said)
    ask_for_two(case.system, first, f"{len(first)}-{windowed}")
    fresh = planned(case, len(second))
    held = {group["name"]: full if group["window"] is None else windowed for group in fresh["groups"]}
    plan = planned(case, len(second), *(f"--cached={name}={count}" for name, count in held.items()))
    assert_moved_as_planned(ask_for_two(case.system, second, f"{len(second)}-{windowed}-held"), plan, said)
    for group, bare in zip(plan["groups"], fresh["groups"], strict=True):  # the control: what is held matters
        assert (group["bytes"] < bare["bytes"]) is (held[group["name"]] > 0), said


def test_a_prompt_that_begins_like_another_moves_what_the_plan_says(case: Case) -> None:
    """The decode worker received the first prompt's last window only, and all of it where attention is full."""
    dice = random.Random(case.name)
    first = tokens(dice, dice.randint(80, 120))
    shared = len(first) - dice.randint(0, 8)  # ends in the window of both, whole blocks of which are held
    second = first[:shared] + tokens(dice, len(first) + dice.randint(1, 4) - shared)
    assert_second_moves_as_planned(case, first, second, full=shared, windowed=shared)
    first = tokens(dice, dice.randint(80, 120))
    shared = dice.randint(case.block_size, len(first) - WINDOW - case.block_size)  # before what the window needed
    second = first[:shared] + tokens(dice, dice.randint(1, len(first) - 1 - shared))
    assert_second_moves_as_planned(case, first, second, full=shared, windowed=0)


def test_scratch_slots_show_on_the_worker_that_has_them(case: Case) -> None:
    """The gauge is the most in any step so far. Two whole chunks, so that the last step has some too."""
    if case.name in SCRATCHED:
        ask_for_two(case.system, tokens(random.Random("scratch"), 2 * CHUNK), "scratch")
        case.system.settle()
    on_prefill = case.system.total("disagg_kv_blocks_scratch", worker="prefill-0")
    assert (on_prefill > 0) is (case.name in SCRATCHED)
    assert case.system.total("disagg_kv_blocks_scratch", worker="decode-0") == 0
