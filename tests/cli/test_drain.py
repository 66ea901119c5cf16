"""`disagg drain` against an admin listener that says what a test scripts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from disagg.cli.main import main


@dataclass
class Listener:
    """`counts`: the requests that `decode-0` has at each look; None once it is not registered any more."""

    url: str = ""
    counts: list[int | None] = field(default_factory=lambda: [0])
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if path == "/workers":
            count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
            return 200, {"workers": [] if count is None else [{"id": "decode-0", "requests": count}]}
        if path == "/workers/decode-0/drain":
            return 200, {"worker": "decode-0", "draining": method == "POST"}
        return 404, {"error": {"message": "no worker `decode-9` is registered"}}


@pytest.fixture
def listener() -> Iterator[Listener]:
    scripted = Listener()

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            status, body = scripted.answer(self.command, self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = handle_one

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        scripted.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted
        server.shutdown()
        thread.join()


def run(listener: Listener, *words: str) -> int:
    return main(["drain", *words, "--admin", listener.url])


def test_it_returns_when_the_worker_is_empty(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    listener.counts = [3, 3, 1, 0]
    assert run(listener, "decode-0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["`decode-0` has 3 requests", "`decode-0` has 1 requests", "`decode-0` is empty"]
    assert listener.asked[0] == "POST /workers/decode-0/drain"


def test_it_does_not_wait_when_told_so(listener: Listener) -> None:
    assert run(listener, "decode-0", "--no-wait") == 0
    assert listener.asked == ["POST /workers/decode-0/drain"]


def test_a_worker_that_leaves_before_it_is_empty_is_told_by_the_exit_code(listener: Listener) -> None:
    listener.counts = [2, None]
    assert run(listener, "decode-0") == 1


def test_undo_gives_it_requests_again(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(listener, "decode-0", "--undo") == 0
    assert listener.asked == ["DELETE /workers/decode-0/drain"]
    assert "is given requests again" in capsys.readouterr().out


def test_a_worker_that_is_not_registered_is_refused_with_those_that_are(
    listener: Listener, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(listener, "decode-9") == 2
    assert "no worker `decode-9` is registered: registered are decode-0" in capsys.readouterr().err


def test_an_address_where_nothing_listens_is_refused_with_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "decode-0", "--admin", "http://127.0.0.1:1"]) == 2
    assert "give `--admin` the address that it says when it starts" in capsys.readouterr().err
