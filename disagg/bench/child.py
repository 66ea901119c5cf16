"""A side's process: answers the controller's requests, one JSON line each, over an inherited socket.

Run as `python -m disagg.bench.child FD PLANE source|destination on|off`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import time
import traceback
from typing import Any, Final

import numpy as np

from disagg.bench.cases import CASES
from disagg.bench.contenders import make_side
from disagg.bench.side import ContenderSide, wait_until

MAX_LINE_NBYTES: Final = 64 << 20  # 13312 hashes of 20 digits are a third of a MiB; this is no bound that matters


async def serve(side: ContenderSide, sock: socket.socket) -> None:
    """Until the controller hangs up."""
    reader, writer = await asyncio.open_connection(sock=sock, limit=MAX_LINE_NBYTES)
    while line := await reader.readline():
        try:
            answer = await _answer(side, json.loads(line))
        except Exception:  # everything is the controller's to report
            answer = {"error": traceback.format_exc()}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    writer.close()
    os._exit(0)  # a controller that died asked for no `close`: threads of libzmq or NIXL would keep this process


async def _answer(side: ContenderSide, request: dict[str, Any]) -> Any:
    blocks = np.array(request.get("mine", ()), dtype=np.int64)
    match request["do"]:
        case "open":
            said = await side.open(CASES[request["case"]], bytes.fromhex(request["secret"]))
            side.fill(seed=1 if side.is_source else 2)
            return said
        case "connect":
            await side.connect(request["other"])
            gc.collect()
            gc.freeze()  # as workers do, see worker/main.py
            return None
        case "prepare":
            if side.is_source:
                side.refresh(blocks, request["number"])
            else:
                side.scribble(blocks)
            await side.prepare(request["number"], blocks, np.array(request["theirs"], dtype=np.int64))
            return {"digest_s": getattr(side, "digest_s", 0.0)}
        case "move":
            return await _move(side, request["at"])
        case "hash":
            return side.hashes(blocks)
        case "close":
            return await side.close()
    raise ValueError(request["do"])


async def _move(side: ContenderSide, at: float) -> dict[str, Any]:
    await wait_until(at)
    cpu = time.process_time()
    num_operations = await side.move()
    ended_at, cpu_s = time.monotonic(), time.process_time() - cpu
    computed_at = getattr(side, "computed_at", at)
    return {"end": ended_at, "computed": computed_at, "cpu_s": cpu_s, "operations": num_operations}


def main() -> None:
    fd, plane, role, digests = sys.argv[1:]
    asyncio.run(serve(make_side(plane, role == "source", digests == "on"), socket.socket(fileno=int(fd))))


if __name__ == "__main__":
    main()
