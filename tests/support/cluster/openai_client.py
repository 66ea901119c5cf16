"""The API on a loopback port, and clients for it: the stock `openai` one and a bare one for what that cannot send."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
from support.cluster.fake_backend import FakeBackend

from disagg.api.app import open_app
from disagg.api.http.server import serve
from disagg.api.settings import ApiSettings


@dataclass(frozen=True)
class Reply:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Payloads of a server-sent event stream; `[DONE]` stays a string."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Api:
    """A served application with its backend."""

    def __init__(self, url: str, backend: FakeBackend, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.backend = backend
        self.session = session

    async def request(self, method: str, path: str, **options: Any) -> Reply:
        async with self.session.request(method, self.url + path, **options) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, headers, await response.read())

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Reply:
        return await self.request("POST", path, json=body, **options)

    async def complete(self, **body: Any) -> Reply:
        return await self.post("/v1/completions", {"prompt": "Hello", **body})

    async def chat(self, **body: Any) -> Reply:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], **body})


@asynccontextmanager
async def served(settings: ApiSettings, backend: FakeBackend | None = None) -> AsyncIterator[Api]:
    """The API over a fake backend, on a free port."""
    backend = backend or FakeBackend()
    async with (
        open_app(backend, settings) as app,
        serve(app, "127.0.0.1", 0, shutdown_timeout_s=1) as listener,
        aiohttp.ClientSession() as session,
    ):
        yield Api(listener.url, backend, session)


@asynccontextmanager
async def stock_client(url: str, api_key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    """The client as users configure it, without retries, so that a test sees every status."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0) as client:
        yield client
