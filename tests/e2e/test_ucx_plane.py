"""Requests whose KV goes through real UCX between real processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.cluster.system import running
from support.faults.wrong import same
from support.model.families import build_family, safe_prompts, save_family
from support.oracles.token_walk import minimum_nbytes, stored_layers

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"),
]

BLOCK_SIZE = 8
NUM_TOKENS = 4
LENGTHS = (9, 24, 97)
FLAGS = ("--planes", "ucx", "--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", "128")


def test_answers_over_ucx_are_the_references_and_move_the_minimum(tmp_path: Path) -> None:
    model = build_family("gemma3")
    references, layers = safe_prompts(model, LENGTHS, NUM_TOKENS), stored_layers(model, itemsize=4)
    flags = (*FLAGS, "--no-enable-prefix-caching", "--max-num-seqs", "8")
    with running("--model", str(save_family("gemma3", tmp_path)), *flags) as system:
        for reference in references:
            prompt_len = len(reference.prompt)
            status, answer = system.complete(
                list(reference.prompt),
                request_id=f"p{prompt_len}",
                max_tokens=NUM_TOKENS,
                temperature=0,
                ignore_eos=True,
            )
            assert status == 200, answer
            same(tuple(answer["choices"][0]["token_ids"]), reference.token_ids)
            expected = sum(minimum_nbytes(layers, prompt_len, BLOCK_SIZE).values())
            assert system.record(f"p{prompt_len}")["transfer"]["nbytes"] == expected
        ((link,),) = [worker["links"] for worker in system.workers("decode")]
        assert link["state"] == "ready"
        assert link["plane"].startswith("ucx (tcp/lo"), link
        assert link["gb_per_s"] > 0
        system.settle()
        assert sum(system.samples("disagg_transfers_total", plane="ucx", outcome="verified").values()) == len(LENGTHS)
