"""Workers that store KV in different types, in different blocks, over different planes, as real processes.

The answer's first token is the prefill worker's; the second one's logprobs are what the decode worker made of KV that
was computed, stored, converted and sent by others. They are held against transformers' own, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any
from uuid import uuid4

import pytest
import torch
from support.cluster.mixed_cluster import START_TIMEOUT_S, mixed_cluster
from support.cluster.system import System
from support.faults.wrong import same
from support.model.families import VOCAB_SIZE, Reference, build_family, reference_generate, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(2 * START_TIMEOUT_S)]

WORKERS = {  # role, KV type, tokens per block, planes
    "prefill-fp32": ("prefill", "float32", 16, "shm,tcp,zmq"),
    "prefill-bf16": ("prefill", "bfloat16", 8, "shm,tcp,zmq"),
    "prefill-fp8": ("prefill", "fp8", 8, "shm,tcp,zmq"),
    "decode-fp32": ("decode", "float32", 16, "shm"),
    "decode-bf16": ("decode", "bfloat16", 8, "tcp"),
    "decode-fp8": ("decode", "fp8_e4m3", 16, "zmq"),
}
NBYTES = {"float32": 4, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1}
# Of logprobs, by the coarsest type on the way: about three times what one cache of that type does to this model.
TOLERANCE = {4: 2e-3, 2: 0.03, 1: 0.3}
MIN_GAP = 0.7  # more than fp8 moves two logprobs apart, so that every pair has the same first token
LENGTHS = (8, 33, 70)


@dataclass(frozen=True)
class Case:
    system: System
    layers: list[StoredLayer]
    references: list[Reference]


def clear_prompt(model: Any, length: int) -> Reference:
    for seed in range(200):
        generator = torch.Generator().manual_seed(1009 * length + seed)
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        if (reference := reference_generate(model, prompt, 2)).min_gap >= MIN_GAP:
            return reference
    raise AssertionError(f"no prompt of {length} tokens with a clear answer")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("dtypes")
    model = build_family("gemma3")
    references = [clear_prompt(model, length) for length in LENGTHS]
    for role, scale in (("prefill", 0.12), ("decode", 0.07)):  # unequal, so that fp8 is converted into fp8
        scales = {str(layer): {"k": scale, "v": [scale, 2 * scale]} for layer in range(4)}
        (folder / f"{role}.json").write_text(json.dumps(scales))
    flags = {}
    for name, (role, dtype, block_size, planes) in WORKERS.items():
        flags[name] = (role, "--kv-cache-dtype", dtype, "--block-size", str(block_size), "--planes", planes)
        if NBYTES[dtype] == 1:
            flags[name] += ("--kv-scales", str(folder / f"{role}.json"))
    with mixed_cluster(save_family("gemma3", folder / "model"), folder, flags) as system:
        yield Case(system, stored_layers(model, itemsize=1), references)


def ask(system: System, reference: Reference, request_id: str) -> Any:
    options = {"max_tokens": 2, "temperature": 0, "ignore_eos": True, "logprobs": 5}
    status, body = system.complete(
        list(reference.prompt),
        request_id=request_id,
        cache_salt=request_id,
        return_tokens_as_token_ids=True,
        **options,
    )
    assert status == 200, body
    return body["choices"][0]


def test_every_pair_of_types_answers_within_its_bound_and_moves_the_narrower(case: Case) -> None:
    pairs = set(product((n for n in WORKERS if n[0] == "p"), (n for n in WORKERS if n[0] == "d")))
    for reference in case.references:
        prompt_len, seen = len(reference.prompt), set()
        for turn in range(len(pairs)):  # an idle cluster's pairs take turns
            request_id = f"p{prompt_len}-{turn}-{uuid4().hex[:6]}"
            choice = ask(case.system, reference, request_id)
            record = case.system.record(request_id)
            (attempt,) = record["attempts"]
            pair = attempt["prefill"], attempt["decode"]
            seen.add(pair)
            ends = [WORKERS[name] for name in pair]
            width = min(NBYTES[dtype] for _, dtype, _, _ in ends)
            moved = minimum_nbytes(case.layers, prompt_len, min(size for _, _, size, _ in ends))
            assert record["transfer"]["nbytes"] == width * sum(moved.values()), pair
            assert record["transfer"]["plane"] == ends[1][3]
            same(choice["token_ids"][0], reference.token_ids[0], pair)
            given = choice["logprobs"]["top_logprobs"][1]
            expected = dict(reference.top_logprobs[1])
            for name, value in given.items():
                token = int(name.removeprefix("token_id:"))
                if token in expected:  # the likeliest of either may leave the other's five
                    assert value == pytest.approx(expected[token], abs=TOLERANCE[width]), pair
            assert any(int(name.removeprefix("token_id:")) == reference.token_ids[1] for name in given), pair
        assert seen == pairs
    case.system.settle()
    case.system.wait_until_idle()
    assert case.system.total("disagg_kv_saturated_total") == 0


def test_blocks_of_different_histories_are_never_mixed_up(case: Case) -> None:
    """One salt for all: a decode worker that has a prompt from one type must ask again for it in another."""
    reference, salt = case.references[-1], uuid4().hex
    moved: dict[tuple[str, str], list[int]] = {}
    for turn in range(27):
        status, _ = case.system.complete(
            list(reference.prompt), request_id=f"{salt}-{turn}", max_tokens=2, temperature=0, cache_salt=salt
        )
        assert status == 200
        record = case.system.record(f"{salt}-{turn}")
        (attempt,) = record["attempts"]
        moved.setdefault((attempt["prefill"], attempt["decode"]), []).append(record["transfer"]["nbytes"])
    for pair, sizes in moved.items():
        ends = [WORKERS[name] for name in pair]
        width, unit = min(NBYTES[end[1]] for end in ends), min(end[2] for end in ends)
        whole = width * sum(minimum_nbytes(case.layers, len(reference.prompt), unit).values())
        assert sizes[0] == whole, f"{pair}: used blocks of another history"
        assert all(size < whole for size in sizes[1:]), f"{pair}: used none of its own"
