"""`disagg demo`: one real request through a prefill worker, a transfer and a decode worker, and what it moved."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import aiohttp

from disagg.cli.supervisor import Ready
from disagg.cli.up import WorkerPair, authorization, serve
from disagg.config.quantities import format_nbytes
from disagg.config.settings import DemoSettings

REQUEST_ID: Final = "demo"
TIMEOUT_S: Final = 120.0  # a laptop's slowest core needs a few seconds; past this something hangs

# The register that the bundled model learnt, about five of its 64-token windows long. It does not end in a space:
# byte-level BPE puts the space on the next token.
PROMPT: Final = """\
A file is a sequence of bytes with a name. A program that wants to read a file has to open it first, and the \
operating system returns a descriptor, which is a small number. The program reads from the descriptor until the \
end of the file is reached, and then it closes the descriptor, so that the operating system can release the \
memory that was used for the file.

When a file is opened for writing, the contents of the file are removed first. If the contents should be kept, \
the file has to be opened for appending, and then every write adds bytes at the end. A write may be buffered: \
the bytes are held in memory until the buffer is full, and a program that ends early may lose them. To make sure \
that all bytes are written, the program calls the flush method, or closes the file.

Opening a file may fail. The name may be wrong, or the user may not have the permission to read it. In both \
cases an exception is raised, and the message of the exception contains the name of the file. If the file does \
not exist,"""


def demo(settings: DemoSettings) -> int:
    """Start everything, ask once, end everything; the exit code."""

    async def work(router: Ready, _workers: Sequence[Ready], _pairs: Sequence[WorkerPair]) -> int:
        headers = {"X-Request-Id": REQUEST_ID, **authorization(settings)}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            return await ask(session, router, settings.served_name)

    return serve(settings, work)


async def ask(session: aiohttp.ClientSession, router: Ready, model: str) -> int:
    """Print the answer as it comes, then the line from the request's own records."""
    _write("..." + PROMPT[PROMPT.rindex("\n") :].strip()[-60:])
    async for text in stream(session, router["url"], request_body(model)):
        _write(text)
    _write("\n\n")
    async with session.get(f"{router['admin']}/requests/{REQUEST_ID}") as response:
        response.raise_for_status()
        _write(transfer_line(await response.json()) + "\n")
    return 0


def request_body(model: str) -> dict[str, Any]:
    """Sampled, because a small model's greedy text soon repeats itself; seeded, so that every run shows the same."""
    sampling = {"temperature": 0.7, "top_k": 40, "seed": 7, "max_tokens": 64}
    return {"model": model, "prompt": PROMPT, "stream": True, **sampling}


async def stream(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> AsyncIterator[str]:
    """Texts of a streamed completion. Raises aiohttp.ClientError when the answer is an error or ends early."""
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise aiohttp.ClientError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data.startswith("{"):
                yield _text(json.loads(data))
    raise aiohttp.ClientError("the stream ended without [DONE]")


def transfer_line(record: Mapping[str, Any]) -> str:
    """What `GET /requests/{id}` says was moved, in one line."""
    moved = record["transfer"]
    if moved is None:
        return f"{record['prompt_tokens']} prompt tokens, nothing moved: one worker served the request"
    groups = ", ".join(f"{g['name']} {g['num_blocks']} blocks {format_nbytes(g['nbytes'])}" for g in moved["groups"])
    return (
        f"{record['prompt_tokens']} prompt tokens; moved over {moved['plane']}: {groups}; "
        f"{format_nbytes(moved['nbytes'])} in all, a full copy would have moved "
        f"{format_nbytes(moved['full_copy_nbytes'])}; "
        f"time to first token {record['ttft_s'] * 1000:.0f} ms"
    )


def _text(event: Mapping[str, Any]) -> str:
    if "error" in event:
        raise aiohttp.ClientError(event["error"]["message"])
    return "".join(choice["text"] for choice in event["choices"])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
