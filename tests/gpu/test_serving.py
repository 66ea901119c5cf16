"""`disagg up` on GPUs, over HTTP: tokens of transformers on a CPU, and bytes equal to the minimum."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support.cluster.system import running
from support.faults.wrong import same
from support.model.families import build_family, safe_prompts, save_family
from support.oracles.token_walk import minimum_nbytes, stored_layers

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.timeout(600)]  # Triton compiles at first use

NUM_TOKENS, BLOCK_SIZE = 12, 16
LENGTHS = (9, 33, 97)
PLACES = {
    "one GPU": ("cuda:0", "cuda:0"),
    "two GPUs": ("cuda:0", "cuda:1"),
    "prefill on a CPU": ("cpu", "cuda:0"),
    "decode on a CPU": ("cuda:0", "cpu"),
}


@pytest.mark.parametrize("plane", ["shm", "tcp", "zmq", "ucx"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_tokens_equal_a_cpus_and_bytes_the_minimum(family: str, place: str, plane: str, tmp_path: Path) -> None:
    devices = PLACES[place]
    if (missing := len(set(devices) - {"cpu"}) - torch.cuda.device_count()) > 0:
        pytest.skip(f"needs {missing} CUDA device(s) more than the {torch.cuda.device_count()} here")
    if plane == "ucx" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    model = build_family(family)
    references = safe_prompts(model, LENGTHS, NUM_TOKENS)
    layers = stored_layers(model, itemsize=4)
    flags = ("--prefill-devices", devices[0], "--decode-devices", devices[1], "--planes", plane)
    limits = ("--block-size", str(BLOCK_SIZE), "--max-model-len", "256", "--kv-cache-memory", "256MiB")
    folder = save_family(family, tmp_path / "model")
    with running("--model", str(folder), "--dtype", "float32", *limits, *flags) as system:
        for reference in references:
            length = len(reference.prompt)
            greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
            status, body = system.complete(list(reference.prompt), request_id=f"p{length}", **greedy)
            assert status == 200, body
            same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)
            transfer = system.record(f"p{length}")["transfer"]
            assert transfer["nbytes"] == sum(minimum_nbytes(layers, length, BLOCK_SIZE).values())
        system.settle()
        assert (system.total("disagg_graph_replays_total") > 0) == (devices[1] != "cpu"), "decode steps ran eager"
        system.wait_until_idle()
