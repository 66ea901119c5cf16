"""Clients of a streaming API in one process, as cheap as they can be: bodies of bytes out, events counted as they come.

    python -m disagg.bench.streams --url http://127.0.0.1:8000 --streams 32 --requests 64 --max-tokens 64

Prints one JSON object: answers, tokens, time to first token and between the first and the last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

END = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Streamed:
    """One answer: seconds from sending to its first event and to its end; `fault` is empty when it was whole."""

    ttft_s: float
    total_s: float
    num_events: int
    fault: str = ""


def request(path: str, num_prompt: int, max_tokens: int, seed: int) -> bytes:
    """A whole HTTP request. Prompts differ in their first token, so that none is found in a cache."""
    prompt = [300 + seed % 1000, *(300 + i % 1000 for i in range(1, num_prompt))]
    fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    body = json.dumps(fields, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes) -> Streamed:
    """One answer over a connection that is kept."""
    began_at = time.perf_counter()
    writer.write(sent)
    first_at, num_events, tail = 0.0, 0, b""
    while True:
        data = await reader.read(1 << 16)
        if not data:
            return Streamed(0, 0, num_events, "the connection ended")
        if not first_at and b"data: " in data:
            first_at = time.perf_counter()
        num_events += data.count(b"data: ")
        tail = (tail + data)[-64:]
        if b"0\r\n\r\n" in tail[-5:]:
            ended_at = time.perf_counter()
            fault = "" if END in tail else "the stream ended with an error"
            return Streamed(first_at - began_at, ended_at - began_at, num_events - 1, fault)


async def client(options: argparse.Namespace, number: int, count: int, gate: asyncio.Event) -> list[Streamed]:
    parts = urlsplit(options.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    sent = request("/v1/completions", options.prompt_length, options.max_tokens, number)
    await gate.wait()
    answers = [await stream(reader, writer, sent) for _ in range(count)]
    writer.close()
    return answers


def summary(answers: Sequence[Streamed], max_tokens: int, wall_s: float) -> dict[str, Any]:
    whole = [answer for answer in answers if not answer.fault]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    if not whole:
        return {"num_answers": 0, "faults": [answer.fault for answer in answers][:3]}
    ttft = sorted(answer.ttft_s for answer in whole)
    return {
        "num_answers": len(whole),
        "faults": sorted({answer.fault for answer in answers if answer.fault}),
        "num_tokens": len(whole) * max_tokens,
        "num_events": sum(answer.num_events for answer in whole),
        "wall_s": wall_s,
        "ttft_ms_median": 1e3 * statistics.median(ttft),
        "ttft_ms_p99": 1e3 * ttft[min(len(ttft) - 1, int(0.99 * len(ttft)))],
        "total_s_median": statistics.median(answer.total_s for answer in whole),
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


async def run(options: argparse.Namespace) -> None:
    gate = asyncio.Event()
    each = max(1, options.requests // options.streams)
    clients = [asyncio.create_task(client(options, i, each, gate)) for i in range(options.streams)]
    await asyncio.sleep(0.2)
    began_at = time.perf_counter()
    gate.set()
    answers = [answer for found in await asyncio.gather(*clients) for answer in found]
    print(json.dumps(summary(answers, options.max_tokens, time.perf_counter() - began_at)))  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, default=16)
    asyncio.run(run(parser.parse_args()))
