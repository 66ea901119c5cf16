"""More idle clients than a process may have open files: others go on, and the log stays short."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = """
import asyncio, logging, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from support.cluster.fake_backend import FakeBackend
from support.model.small_tokenizers import DEMO_FOLDER
from disagg.api.app import open_app
from disagg.api.http.connections import Connections, connections_within
from disagg.api.http.server import serve
from disagg.api.settings import ApiSettings
from disagg.config.descriptors import raise_descriptor_limit

async def main():
    logging.basicConfig()
    clients = Connections(connections_within(raise_descriptor_limit()))
    settings = ApiSettings(model_folder=DEMO_FOLDER, served_model_name="demo")
    async with open_app(FakeBackend(), settings) as app, serve(app, "127.0.0.1", 0, connections=clients) as listener:
        print(listener.port, clients.bound, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
NUM_IDLE = 600  # this process has both its own limit and the other end of each


@contextlib.contextmanager
def server(soft: int, hard: int, log: Path) -> Iterator[tuple[int, int]]:
    """Yield (port, most clients) of a server with these limits."""
    command = [sys.executable, "-c", SERVER, str(soft), str(hard)]
    support = str(Path(__file__).parents[1])
    with (
        log.open("w") as written,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=written, text=True, env={"PYTHONPATH": support}
        ) as run,
    ):
        try:
            assert run.stdout is not None
            found = re.match(r"(\d+) (\d+)", run.stdout.readline())
            assert found, log.read_text()
            yield int(found[1]), int(found[2])
        finally:
            run.kill()


def ask(client: http.client.HTTPConnection, prompt: str = "hello", *, may_reconnect: bool = False) -> int:
    """The status. `may_reconnect`: as clients do when the server closed an idle connection."""
    try:
        return _ask(client, prompt)
    except (ConnectionError, http.client.RemoteDisconnected):
        if not may_reconnect:
            raise
        client.close()
        return _ask(client, prompt)


def _ask(client: http.client.HTTPConnection, prompt: str) -> int:
    client.request("POST", "/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 2}))
    response = client.getresponse()
    response.read()
    return response.status


@pytest.mark.parametrize(("soft", "hard"), [(256, 256), (64, 2048)])
@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHos", b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_idle_clients_take_nothing_from_others(soft: int, hard: int, sent: bytes, tmp_path: Path) -> None:
    log, has_sent_a_head = tmp_path / "log", b"\r\n\r\n" in sent  # such a client is missed more than an idle one
    with server(soft, hard, log) as (port, bound), contextlib.ExitStack() as stack:
        assert bound == (128 if hard == 256 else 1536)
        old = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        stack.callback(old.close)
        assert ask(old) == 200
        for number in range(NUM_IDLE):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            with contextlib.suppress(ConnectionError):  # closed already for a later one
                idle.sendall(sent)
            if number % 100 == 99:
                assert ask(old, may_reconnect=has_sent_a_head) == 200
        assert ask(old, may_reconnect=has_sent_a_head) == 200
        assert ask(old, "a long prompt that a helper must be started for " * 100) == 400
        new = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        stack.callback(new.close)
        assert ask(new) == 200
        assert ask(old, may_reconnect=has_sent_a_head) == 200
    assert len(log.read_text().splitlines()) <= 1, log.read_text()
