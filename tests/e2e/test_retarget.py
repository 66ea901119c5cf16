"""A prefill worker dies while its KV is landing: the same decode worker goes on at the other one, in real processes."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.cluster.hand_started import FAULTY
from support.cluster.system import running
from support.faults.switches import Faults
from support.faults.wrong import same
from support.model.families import build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NUM_TOKENS = 12
FLAGS = (
    *("--prefill", "2", "--decode", "1", "--dtype", "float32", "--block-size", "8", "--max-model-len", "400"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),
)


def test_a_transfer_whose_source_dies_goes_on_at_the_other_source(tmp_path: Path) -> None:
    model, folder = save_family("gemma3", tmp_path / "gemma3"), tmp_path / "faults"
    folder.mkdir()
    faults = Faults(folder)
    (reference,) = safe_prompts(build_family("gemma3"), (150,), NUM_TOKENS)
    with (
        running("--model", str(model), *FLAGS, program=(str(FAULTY), str(folder))) as system,
        ThreadPoolExecutor(1) as client,
    ):
        options = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        faults.set(pause_landing={"times": 1})
        asked = client.submit(lambda: system.complete(list(reference.prompt), request_id="moved", **options))
        faults.wait_until_fired("pause_landing")
        first = system.record("moved")["attempts"][0]["prefill"]
        os.kill(system.pid_of(first), signal.SIGKILL)
        faults.set()
        status, body = asked.result()
        assert status == 200, body
        same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)
        attempts = system.record("moved")["attempts"]
        assert [attempt["mode"] for attempt in attempts] == ["transfer", "retarget"]
        assert {attempt["prefill"] for attempt in attempts} == {"prefill-0", "prefill-1"}
        system.settle()
        system.wait_until_idle()
