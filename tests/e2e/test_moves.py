"""Every live answer of a decode worker moves to the other while clients read: no token is lost, repeated or changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from support.cluster.calls import Call, until
from support.cluster.three_processes import Part, Trio, running_trio
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

LENGTHS = (9, 40, 73, 130)
NUM_TOKENS = 100
NUM_CALLS = 6
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "256"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
)
WORKERS = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}


@dataclass
class Fleet:
    trio: Trio
    references: list[Reference]
    parts: dict[str, Part] = field(default_factory=dict)

    def is_linked(self) -> bool:
        known = {worker["id"]: worker for worker in self.trio.api.workers()}
        names = [name for name, role in WORKERS.items() if role == "decode"]
        links = [link for name in names if name in known for link in known[name]["links"]]
        return set(known) == set(WORKERS) and [link["state"] for link in links] == ["ready"] * 4

    def records(self, calls: list[Call]) -> list[dict[str, Any]]:
        return [self.trio.api.record(call.request_id) for call in calls]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    with running_trio(model) as trio:
        made = Fleet(trio, [])
        made.parts = {name: trio.start(role, name, *FLAGS) for name, role in WORKERS.items()}
        made.references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
        asyncio.run(until(made.is_linked, "the fleet is linked", 120))
        yield made


async def drained_in_turn(fleet: Fleet, num_rounds: int, tag: str) -> list[Call]:
    """Clients read while one decode worker and then the other is emptied, again and again."""
    references = fleet.references
    prompts = [references[number % len(references)] for number in range(NUM_CALLS)]
    calls = [Call(f"{tag}{n}", True, reference.prompt, NUM_TOKENS) for n, reference in enumerate(prompts)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session, asyncio.TaskGroup() as tasks:
        for call in calls:
            tasks.create_task(call.run(session, fleet.trio.api.url))
        await until(lambda: all(len(call.token_ids) > 3 for call in calls), "every answer has begun")
        for number in range(num_rounds):
            name = f"decode-{number % 2}"
            await asyncio.to_thread(fleet.trio.api.drain, name)
            await until(lambda name=name: fleet.trio.api.worker(name)["requests"] == 0, f"{name} is empty")
            await asyncio.to_thread(fleet.trio.api.drain, name, undo=True)
    return calls


def test_every_answer_of_a_draining_worker_goes_on_elsewhere_with_its_own_tokens(fleet: Fleet) -> None:
    calls = asyncio.run(drained_in_turn(fleet, 2, "m"))
    for number, call in enumerate(calls):
        assert call.is_whole, call
        same(tuple(call.token_ids), fleet.references[number % len(fleet.references)].token_ids, call)
    records = fleet.records(calls)
    moves = sum(record["moves"] for record in records)
    assert moves >= NUM_CALLS // 2, records
    pauses = sorted(a["pause_s"] for r in records for a in r["attempts"] if a["pause_s"] is not None)
    print(f"{moves} moves, pause p50 {pauses[len(pauses) // 2]:.4f} s, longest {pauses[-1]:.4f} s")
    fleet.trio.api.settle()
    fleet.trio.api.wait_until_idle()
