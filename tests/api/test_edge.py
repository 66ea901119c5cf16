"""The bearer key as bytes on the wire."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disagg.api.http.edge import Edge

pytestmark = pytest.mark.anyio


async def statuses(key: str, *sent: bytes) -> list[int]:
    """What a server with `key` answers to each header; its application says nothing, which counts as 0."""
    edge = Edge(lambda *_: asyncio.sleep(0), {key: "t"})
    found = []
    for bearer in sent:
        messages: list[Any] = [{"status": 0}]

        async def send(message: Any, messages: list[Any] = messages) -> None:
            messages.append(message)

        scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Bearer " + bearer)]}
        await edge(scope, lambda: None, send)  # type: ignore[arg-type]
        found.append(messages[1 if len(messages) > 1 else 0]["status"])
    return found


async def test_the_key_is_known_in_the_encodings_that_clients_use() -> None:
    """http.client sends Latin-1, as HTTP says; aiohttp, and curl on a UTF-8 terminal, send UTF-8."""
    assert await statuses("sésame", "sésame".encode(), "sésame".encode("latin-1"), b"s?same") == [0, 0, 401]


async def test_a_key_outside_of_latin_1_is_never_known_by_what_stands_for_it() -> None:
    assert await statuses("🦙", "🦙".encode(), b"?") == [0, 401]
