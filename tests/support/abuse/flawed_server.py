"""A server of token streams with one flaw, on a loopback port: what the watch of honest streams is tried on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 1.5
SEEN_TIMEOUT_S = 60.0  # the client's start on a busy machine, and an answer
TOKEN_EVERY_S = 0.02
STALLS, BREAKS, LIES, STOPS, REFUSES = "stalls", "breaks", "lies", "stops", "refuses"


class FlawedServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, flaw: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.flaw = flaw
        self._asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, prompt: str) -> None:
        self._asked[prompt] += 1

    def wait_until_seen(self, num_streams: int) -> None:
        """Until so many streams have been through an answer with its flaw: each asks for its next."""
        deadline = time.monotonic() + SEEN_TIMEOUT_S
        while sum(count > 1 for count in list(self._asked.values())) < num_streams:
            assert time.monotonic() < deadline, f"the streams asked {dict(self._asked)}"
            time.sleep(0.02)


class _Handler(BaseHTTPRequestHandler):
    server: FlawedServer

    @property
    def flaw(self) -> str:
        return self.server.flaw

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.note(str(asked["prompt"]))
        self.send_response(503 if self.flaw == REFUSES else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.flaw != REFUSES:
            with contextlib.suppress(OSError):  # the client left
                self._stream(asked["max_tokens"])

    def _stream(self, num_tokens: int) -> None:
        for number in range(num_tokens):
            if number == num_tokens // 2:
                if self.flaw == STALLS:
                    time.sleep(STALL_S)
                if self.flaw == BREAKS:
                    return self._say({"error": {"message": "the worker was lost"}})
                if self.flaw == STOPS:
                    return None
            self._say({"choices": [{"token_ids": [number + (self.flaw == LIES)]}]})
            time.sleep(TOKEN_EVERY_S)
        return self._write(b"data: [DONE]\n\n")

    def _say(self, event: Any) -> None:
        self._write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def flawed_server(flaw: str = "") -> Iterator[FlawedServer]:
    """The ids of an answer are 0, 1, 2 and so on."""
    server = FlawedServer(flaw)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
