"""Settings whose effect only a running system has: given as flags, variables and a file, seen from outside."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from support.cluster.system import System, running
from support.model.families import build_family, save_family

from disagg.config.secret import INSECURE_SECRET
from disagg.config.settings import WorkerSettings
from disagg.engine.commands import Serve
from disagg.engine.model.checkpoint import fingerprint
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import AttemptKey, Sampling
from disagg.worker.build import make_engine

pytestmark = pytest.mark.processes

KEY = "a key for clients"
BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, CHUNK = 32, 160, 3, 20
KV_NBYTES = 400 << 10  # for both workers: too little for three of the longest sequences, so that all of it is taken

FILE = {
    "block_size": 64,  # the flag says otherwise
    "dtype": "float32",  # the variable says otherwise
    "max_num_seqs": MAX_NUM_SEQS,
    "max_num_batched_tokens": CHUNK,
    "planes": ["zmq"],
    "served_model_name": "by-file",
}
VARIABLES = {
    "DISAGG_DTYPE": "bfloat16",
    "DISAGG_API_KEY": KEY,
    "DISAGG_MAX_MODEL_LEN": "512",  # the flag says otherwise
    "DISAGG_KV_CACHE_MEMORY": f"{KV_NBYTES >> 10}KiB",
    "DISAGG_THREADS": "1",
}


@dataclass(frozen=True)
class Keyed:
    """A system that asks for a key, and its model."""

    system: System
    model: Path
    num_kv_elements: int

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.system.url}/v1", api_key=key, max_retries=0)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """From the admin listener, which asks for no key."""
        return list(self.system.get("/workers", admin=True)["workers"])

    def generate(self, prompt_len: int, max_tokens: int) -> Any:
        with self.client(KEY) as client:
            return client.completions.create(
                model="by-file",
                prompt=[5 + i % 200 for i in range(prompt_len)],
                max_tokens=max_tokens,
                extra_body={"ignore_eos": True, "return_token_ids": True},
                extra_headers={"X-Request-Id": f"{prompt_len}-{max_tokens}"},
            )


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    model = save_family("llama", tmp_path_factory.mktemp("llama"))
    attention = build_family("llama").model.layers[0].self_attn
    file = tmp_path_factory.mktemp("settings") / "disagg.yaml"
    file.write_text(json.dumps(FILE))  # JSON is YAML
    flags = ("--model", str(model), "--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN))
    with running("--config", str(file), *flags, env=VARIABLES) as system:
        yield Keyed(system, model, 4 * 2 * attention.k_proj.out_features)  # per token: 4 layers, K and V


def test_block_size_dtype_length_and_plane_are_what_workers_registered_with(keyed: Keyed) -> None:
    for worker in keyed.workers:
        assert worker["geometry"]["block_size"] == BLOCK_SIZE
        assert worker["geometry"]["slot_nbytes"] == [BLOCK_SIZE * keyed.num_kv_elements * 2]
        assert worker["geometry"]["kv_dtype"] == worker["identity"]["compute_dtype"] == "bfloat16"
        assert worker["identity"]["max_model_len"] == MAX_MODEL_LEN
        assert worker["planes"] == ["zmq"]
        assert worker["identity"]["model_fingerprint"] == fingerprint(keyed.model)
    links = [link for worker in keyed.workers if worker["role"] == "decode" for link in worker["links"]]
    assert [(link["plane"], link["state"]) for link in links] == [("zmq", "ready")]


def test_kv_cache_memory_is_shared_and_used(keyed: Keyed) -> None:
    for worker in keyed.workers:
        (pool,) = worker["blocks"]
        nbytes = pool["slots"] * worker["geometry"]["slot_nbytes"][0]
        assert KV_NBYTES // 2 - worker["geometry"]["slot_nbytes"][0] < nbytes <= KV_NBYTES // 2
        assert (pool["used"], pool["free"]) == (0, pool["slots"] - 2)
    sizes = [line for line in keyed.system.stdout if "of KV cache" in line]
    assert len(sizes) == 2
    assert all(f"1 of {len(os.sched_getaffinity(0))} cores" in line for line in sizes)


def test_the_key_opens_the_api_and_nothing_else_does(keyed: Keyed) -> None:
    with keyed.client(KEY) as client:
        (model,) = client.models.list().data
        assert (model.id, model.max_model_len) == ("by-file", MAX_MODEL_LEN)  # type: ignore[attr-defined]
    with keyed.client("a wrong key") as client:
        for ask in (client.models.list, lambda: client.completions.create(model="by-file", prompt="x")):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                ask()
    for open_path in ("/health", "/ready", "/metrics"):
        assert keyed.system.get(open_path)
    assert not any(KEY in line for line in [*keyed.system.stdout, *keyed.system.stderr])
    assert any("Bearer YOUR_KEY" in line for line in keyed.system.stdout)


def test_prompts_go_in_chunks_of_the_token_budget(keyed: Keyed) -> None:
    steps = engine_steps(keyed, "prefill-0")
    answer = keyed.generate(97, 4)
    assert len(answer.choices[0].token_ids) == 4
    assert engine_steps(keyed, "prefill-0") - steps == math.ceil(97 / CHUNK)
    record = keyed.system.record("97-4")
    assert record["transfer"]["plane"] == "zmq"
    assert record["transfer"]["num_blocks"] == math.ceil(97 / BLOCK_SIZE)
    assert keyed.system.total("disagg_transfer_bytes_total", plane="zmq") == record["transfer"]["nbytes"] > 0


def test_a_step_decodes_no_more_sequences_than_allowed(keyed: Keyed) -> None:
    name = "disagg_tokens_generated_total"
    steps, tokens = engine_steps(keyed, "decode-0"), keyed.system.total(name, worker="decode-0")
    with ThreadPoolExecutor(9) as clients:
        list(clients.map(lambda i: keyed.generate(8 + i, 40), range(9)))
    steps = engine_steps(keyed, "decode-0") - steps
    tokens = keyed.system.total(name, worker="decode-0") - tokens
    assert tokens == 9 * 39
    assert tokens / MAX_NUM_SEQS <= steps < tokens  # never more than three at once, and more than one


def engine_steps(keyed: Keyed, worker: str) -> float:
    keyed.system.settle()
    return keyed.system.total("disagg_engine_steps_total", worker=worker)


# --- patience -------------------------------------------------------------------------------------------------

# With a heartbeat of 0.5 s before it, below the 3 s after which a silent worker is lost and its requests move on.
REQUEST_TIMEOUT_S = 2.0
PATIENCE = ("--request-timeout-s", str(REQUEST_TIMEOUT_S), "--fetch-wait-s", "0.3", "--max-queued", "2")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model = save_family("llama", tmp_path_factory.mktemp("llama"))
    others = ("--insecure", "--verify-weights", "--log-level", "debug", "--max-num-seqs", "1")
    with running("--model", str(model), "--max-model-len", "512", *PATIENCE, *others) as system:
        assert system.complete([5] * 9, max_tokens=4)[0] == 200  # a process's first step takes longer than any other
        yield system


def test_published_secret_whole_weights_and_debug_lines(impatient: System, tmp_path: Path) -> None:
    keys = ClusterKeys.from_secret(INSECURE_SECRET, insecure=True)
    model = save_family("llama", tmp_path / "llama")
    for worker in impatient.workers():
        assert worker["identity"]["hash_key_id"] == keys.hash_key_id
        assert worker["identity"]["model_fingerprint"] == fingerprint(model, verify_weights=True) != fingerprint(model)
    assert any("level=debug" in line for line in impatient.stderr)


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_blocks_wait_for_their_fetch_and_a_request_for_its_answer_only_so_long(impatient: System) -> None:
    """The decode worker stands still: no FETCH comes for what was computed, and no answer."""
    impatient.wait_until_ready()
    impatient.settle()
    before = impatient.total("disagg_prompt_tokens_computed_total", worker="prefill-0")
    prompt = [5 + int(before) % 100] * 100  # another one at a second try: what is cached is not computed
    with ThreadPoolExecutor(1) as client, standing_still(impatient.pid_of("decode-0")):
        started = time.monotonic()
        asked = client.submit(impatient.complete, prompt, max_tokens=4, request_id="stuck")
        wait_until(lambda: impatient.total("disagg_prompt_tokens_computed_total", worker="prefill-0") == before + 100)
        wait_until(lambda: impatient.total("disagg_kv_blocks_used", worker="prefill-0") == 0)
        assert impatient.total("disagg_kv_blocks_peak", worker="prefill-0") > 0
        assert impatient.record("stuck")["state"] == "running"  # so nobody else told it to free them
        status, answer = asked.result()
        took_s = time.monotonic() - started
    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert took_s >= REQUEST_TIMEOUT_S
    impatient.wait_until_ready()
    impatient.wait_until_idle()
    assert impatient.complete([5] * 9, max_tokens=4, ignore_eos=True)[0] == 200


def test_no_more_requests_wait_than_allowed(impatient: System) -> None:
    impatient.wait_until_ready()
    with ThreadPoolExecutor(12) as clients:
        answers = list(
            clients.map(lambda i: impatient.complete([5 + i] * 9, max_tokens=60, ignore_eos=True), range(12))
        )
    refused = [answer["error"]["message"] for status, answer in answers if status == 503]
    assert refused
    assert set(refused) == {"every worker has 2 requests waiting"}
    assert any(status == 200 for status, _ in answers)


def wait_until(condition: Any, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- without a process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [False, True])
def test_a_cache_that_leaks_ends_a_worker_that_checks_and_no_other(tmp_path: Path, check: bool) -> None:
    model = save_family("llama", tmp_path / "llama")
    settings = WorkerSettings(model=str(model), max_model_len=64, kv_cache_memory=1 << 20, threads=1, check=check)
    made = make_engine(settings, "both", ClusterKeys.from_secret(b"a secret of sixteen bytes"), lambda stage: None)
    made.cache.pools[0].allocate(1)  # nobody's
    command = Serve(AttemptKey("0" * 32, 1), (5, 6, 7), Sampling(max_tokens=2, seed=0))
    with pytest.raises(AssertionError) if check else contextlib.nullcontext():
        made.engine.handle(command)
    made.cache.close()
