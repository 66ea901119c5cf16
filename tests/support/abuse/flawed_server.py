"""A server of token streams with one flaw, on a loopback port: what the watch of honest streams is tried on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_S = 2.0
TOKEN_EVERY_S = 0.02
STALLS, BREAKS, LIES, STOPS, REFUSES = "stalls", "breaks", "lies", "stops", "refuses"


class _Handler(BaseHTTPRequestHandler):
    flaw = ""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
def flawed_server(flaw: str = "") -> Iterator[str]:
    """Its URL. The ids of an answer are 0, 1, 2 and so on."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"flaw": flaw}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
