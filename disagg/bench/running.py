"""`disagg up` in processes of its own, for a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.bench.pair import BenchError
from disagg.config.settings import EngineSettings, RatesSettings

START_S: Final = 180.0
"""Loading a model takes seconds for each GB, on a busy machine minutes."""
STOP_S: Final = 30.0
TOLD: Final = (
    "model",
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
)


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """`url` of its API; `processes`: process ids by worker id, or by what a process does."""

    url: str
    processes: Mapping[str, int]


@contextlib.asynccontextmanager
async def running_system(
    settings: EngineSettings, *more: str, prefill: int = 0, decode: int = 0, both: int = 0
) -> AsyncIterator[RunningSystem]:
    """A system with so many workers while the block runs; `more`: further flags. Raises BenchError."""
    command = [sys.executable, "-P", "-m", "disagg", "up", "--port", "0", "--log-level", "error"]
    command += ["--prefill", str(prefill), "--decode", str(decode), "--both", str(both), *_flags(settings), *more]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        url = await asyncio.wait_for(_url(process), START_S)
        yield RunningSystem(url, dict(processes_below(process.pid)))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _flags(settings: EngineSettings) -> Iterator[str]:
    for name in TOLD:
        if (value := getattr(settings, name)) is not None:
            yield from (f"--{name.replace('_', '-')}", str(value))
    if isinstance(settings, RatesSettings):
        if settings.threads is not None:
            yield from ("--threads", str(settings.threads))
        yield from ("--prefill-devices", settings.device, "--decode-devices", settings.device)


async def _url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        words = line.decode().split()
        if words[:1] == ["curl"]:
            return words[1].partition("/v1/")[0]
    raise BenchError(f"`disagg up` ended with code {await process.wait()} before it was ready")


def processes_below(pid: int) -> Iterator[tuple[str, int]]:
    """A process and all below it, each with a name."""
    words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    told = words[words.index("-m") + 1 :] if "-m" in words else words[:1]
    name = told[1] if told[:1] == ["disagg"] and len(told) > 1 else f"{os.path.basename(told[0])}-{pid}"
    yield words[words.index("--worker-id") + 1] if "--worker-id" in words else name, pid
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield from processes_below(int(child))
