"""Every family through router, prefill worker, transfer and decode worker, against transformers' own `generate`."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.families import FAMILIES, Reference, build_family, safe_prompts, save_family
from support.system import System, running
from support.token_walk import StoredLayer, minimum_nbytes, stored_layers
from support.wrong import same

from disagg.cli.main import main

pytestmark = pytest.mark.processes

BLOCK_SIZE, MAX_MODEL_LEN = 8, 256
NUM_TOKENS = 12
# around the window (24), around blocks of 8, several windows
LENGTHS = (5, 7, 8, 9, 23, 24, 25, 31, 32, 33, 70, 97)
FLAGS = (
    *("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),  # a prime: chunks start inside blocks
)


SCRATCHED = ("gemma3", "gemma3n", "gemma4", "gpt_oss")
"""Served with scratch slots: chunks of 37 outdate blocks of a window of 24. What moves must not change by that."""
PLANNED_LENGTHS = (25, 97)
"""Prompts whose record is compared with what `disagg plan` says: within a window and a block of it, and far past."""


@dataclass(frozen=True)
class Case:
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
    with running("--model", str(folder), *FLAGS, *scratch) as system:
        yield Case(system, folder, stored_layers(model, itemsize=4), references)


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


def planned(folder: Path, prompt_len: int) -> Any:
    """`disagg plan --json` for such a prompt, from config.json alone."""
    out = io.StringIO()
    flags = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN))
    with contextlib.redirect_stdout(out):
        assert main(["plan", "--model", str(folder), "--prompt-len", str(prompt_len), "--json", *flags]) == 0
    return json.loads(out.getvalue())


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
        expected_nbytes = minimum_nbytes(case.layers, prompt_len, BLOCK_SIZE)
        assert moved_by_window(record) == expected_nbytes, f"prompt of {prompt_len}"
        assert record["transfer"]["nbytes"] == sum(expected_nbytes.values()) > 0
        if prompt_len in PLANNED_LENGTHS:
            plan = planned(case.folder, prompt_len)
            moved = {group["name"]: group["nbytes"] for group in record["transfer"]["groups"]}
            assert moved == {group["name"]: group["bytes"] for group in plan["groups"] if group["bytes"]}
            assert record["transfer"]["nbytes"] == plan["bytes"]
        total += record["transfer"]["nbytes"]
    system.settle()
    system.wait_until_idle()
    assert system.total("disagg_transfer_bytes_total", outcome="verified") == total
    assert system.total("disagg_transfer_bytes_total") == total
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == 0
    assert system.total("disagg_prompt_tokens_computed_total", worker="prefill-0") == sum(LENGTHS)
    pids = {worker["pid"] for worker in system.workers()} | {system.pid_of("router")}
    assert len(pids) == 3
