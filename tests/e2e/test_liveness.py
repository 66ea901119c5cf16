"""A prompt of the greatest length, seconds of computing: meanwhile the server answers, and a short prompt overtakes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from support.cluster.calls import Call, until
from support.cluster.system import System, running
from support.model.families import BASE, VOCAB_SIZE, save_tokenizer

from disagg.engine.model.hf import transformers as hf

pytestmark = pytest.mark.processes

MAX_MODEL_LEN = 4096
NUM_TOKENS = 4
LONG_PREFILL_S = 1.5  # at least, for the test to mean something
HELD_SHARE = 1 / 3  # of the long prefill, during which a server that waits for it answers nothing
# 13 million parameters in float32, 52 MB: 0.1 TFLOP of matmuls and as much attention for the longest prompt.
SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.05,
}


def save_model(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf.LlamaForCausalLM(hf.LlamaConfig(**{**BASE, **SIZE})).float().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = save_model(tmp_path_factory.mktemp("llama"))
    flags = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--threads", "1")
    with running("--model", str(folder), *flags, "--kv-cache-memory", "512MiB", env={"DISAGG_CHECK": "0"}) as system:
        yield system


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


async def watch_health(session: aiohttp.ClientSession, system: System, delays: list[float]) -> None:
    while True:
        began = time.monotonic()
        async with session.get(f"{system.url}/health") as response:
            assert response.status == 200
        delays.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


async def race(system: System) -> tuple[Call, Call, list[float]]:
    """The long prompt starts; the short one comes when the prefill worker is in the middle of it."""
    long = Call("long", True, prompt_of(MAX_MODEL_LEN - NUM_TOKENS), NUM_TOKENS)
    short = Call("short", True, prompt_of(20), NUM_TOKENS)
    delays: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as session, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch_health(session, system, delays))
        answers = [asyncio.create_task(long.run(session, system.url))]
        await until(
            lambda: system.total("disagg_prompt_tokens_computed_total", worker="prefill-0") > 0, "a first chunk"
        )
        answers.append(asyncio.create_task(short.run(session, system.url)))
        await asyncio.gather(*answers)
        watching.cancel()
    return long, short, delays


def test_during_a_long_prefill_health_answers_and_a_short_prompt_overtakes(system: System) -> None:
    long, short, delays = asyncio.run(race(system))
    records: dict[str, Any] = {call.request_id: system.record(call.request_id) for call in (long, short)}
    for call in (long, short):
        assert call.is_whole, call
        assert [attempt["mode"] for attempt in records[call.request_id]["attempts"]] == ["transfer"]
    ttft = {name: record["ttft_s"] for name, record in records.items()}
    print(f"time to first token {ttft}; slowest of {len(delays)} health checks {max(delays):.3f} s")
    assert ttft["long"] > LONG_PREFILL_S
    assert short.first_token_at < long.first_token_at
    assert ttft["short"] < ttft["long"] / 2
    assert max(delays) < HELD_SHARE * ttft["long"]  # on a machine that others use, both take longer
    assert len(delays) > 1 / HELD_SHARE
