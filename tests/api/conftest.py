"""The API with its fake backend, once per test file; every test starts from the default script."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from support.cluster.fake_backend import FakeBackend
from support.cluster.openai_client import Api, served, stock_client
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.settings import ApiSettings
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.engine.model.checkpoint import GenerationDefaults

DEFAULTS = GenerationDefaults(
    eos_token_ids=(1,), temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer.load(DEMO_FOLDER)


@pytest.fixture(scope="module")
async def running(anyio_backend: str) -> AsyncIterator[Api]:
    settings = ApiSettings(model_folder=DEMO_FOLDER, served_model_name="demo", defaults=DEFAULTS)
    async with served(settings) as api:
        yield api


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds of processor that the longest turn of the loop took: no other process's load is in them."""
    found, run = [0.0], asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        started = time.thread_time()
        run(handle)
        found[0] = max(found[0], time.thread_time() - started)

    gc.disable()  # a test process has far more objects to look at than a router
    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    yield found
    gc.enable()


@pytest.fixture
def api(running: Api) -> Api:
    """Changed in place: the application under test holds this very backend."""
    running.backend.__dict__.update(FakeBackend().__dict__)
    return running


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with stock_client(api.url) as client:
        yield client
