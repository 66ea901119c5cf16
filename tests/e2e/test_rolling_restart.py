"""Two prefill and two decode workers under constant load, each restarted in turn: in order, and by kill -9."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from support.cluster.calls import Call, until
from support.cluster.three_processes import Part, Trio, running_trio
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

WORKERS = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
LENGTHS = (9, 40, 73, 130)
NUM_TOKENS = 60  # an answer outlasts several heartbeats, so that a drain has something to wait for
NUM_CLIENTS = 4
RETRY_AFTER_S = 1.0
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "256"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),
)
DRAINED_S = 20.0
DRAINING = re.compile(r"draining: (?P<open>\d+) requests")


@dataclass
class Load:
    """Clients that ask one after the other until told to stop."""

    url: str
    references: list[Reference]
    calls: list[tuple[Call, Reference]] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        numbers = itertools.count()
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(self._ask(session, numbers))

    async def _ask(self, session: aiohttp.ClientSession, numbers: Iterator[int]) -> None:
        while not self.is_over:
            number = next(numbers)
            reference = self.references[number % len(self.references)]
            call = Call(f"r{number}", bool(number // 3 % 2), reference.prompt, NUM_TOKENS)
            self.calls.append((call, reference))
            await call.run(session, self.url)
            if call.error is not None:
                await asyncio.sleep(RETRY_AFTER_S)  # as told; else clients starve the worker that is starting

    @property
    def num_answered(self) -> int:
        return sum(call.is_whole for call, _ in self.calls)


@dataclass
class Cluster:
    trio: Trio
    references: list[Reference]
    parts: dict[str, Part] = field(default_factory=dict)

    def start(self, name: str) -> None:
        self.parts[name] = self.trio.start(WORKERS[name], name, *FLAGS)

    def is_linked(self) -> bool:
        assert all(part.process.poll() is None for part in self.parts.values()), [p.text for p in self.parts.values()]
        known = {worker["id"]: worker for worker in self.trio.api.workers()}
        links = [link for name in ("decode-0", "decode-1") if name in known for link in known[name]["links"]]
        states = [link["state"] for link in links if link["worker"].startswith("prefill")]
        return set(known) == set(WORKERS) and states == ["ready"] * 4

    async def restart_each(self, end: Callable[[Part], None]) -> Load:
        """Under load: `end` a worker, start it again, wait until it is linked and has served, go on with the next."""
        load = Load(self.trio.api.url, self.references)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await until(lambda: load.num_answered > NUM_CLIENTS, "answers before anything is restarted", 60)
            for name in WORKERS:
                await asyncio.to_thread(end, self.parts[name])
                self.start(name)
                await until(self.is_linked, f"{name} is back", 90)
                answered = load.num_answered
                await until(lambda seen=answered: load.num_answered > seen + NUM_CLIENTS, "answers in between", 60)
            load.is_over = True
        return load


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    with running_trio(model) as trio:
        made = Cluster(trio, [])
        for name in WORKERS:
            made.start(name)
        made.references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
        asyncio.run(until(made.is_linked, "the cluster is linked", 120))
        yield made


def ask_unloaded(cluster: Cluster) -> None:
    """What the clients of the load must get is what a cluster answers that has nothing else to do."""
    for reference in cluster.references:
        options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        status, body = cluster.trio.api.complete(list(reference.prompt), **options)
        assert status == 200, body
        same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)


def assert_nothing_is_held(cluster: Cluster) -> None:
    cluster.trio.api.settle()
    cluster.trio.api.wait_until_idle()


def end_in_order(part: Part) -> None:
    """SIGTERM, as an orchestrator sends it: exit code 0, within the drain's time, with nothing left behind."""
    part.process.terminate()
    assert part.wait_for_end(DRAINED_S) == 0, part.text
    assert "drained" in part.text, part.text


def test_workers_restarted_one_by_one_under_load_lose_no_request(cluster: Cluster) -> None:
    ask_unloaded(cluster)
    first = dict(cluster.parts)
    load = asyncio.run(cluster.restart_each(end_in_order))
    for call, reference in load.calls:
        assert call.is_whole, call
        same(tuple(call.token_ids), reference.token_ids, call)
    assert_nothing_is_held(cluster)
    waited_for = {name: int(DRAINING.search(part.text)["open"]) for name, part in first.items()}  # type: ignore[index]
    assert any(waited_for[name] for name in ("decode-0", "decode-1")), waited_for  # else nothing was tested
    print(f"{len(load.calls)} requests, all answered; open when each drain began: {waited_for}")


def test_workers_killed_one_by_one_under_load_end_answers_with_a_true_status_or_not_at_all(cluster: Cluster) -> None:
    load = asyncio.run(cluster.restart_each(Part.kill))
    outcomes: Counter[str] = Counter()
    for call, reference in load.calls:
        answer = list(reference.token_ids)
        same(call.token_ids, answer[: len(call.token_ids)], call)
        if call.is_whole:
            same(call.token_ids, answer, call)
            outcomes["answered"] += 1
        else:
            # It had begun on the decode worker; what had not is tried elsewhere while attempts are left.
            assert call.error is not None, call
            assert not call.is_done, call
            has_begun = 200 if call.stream else 502
            assert call.status == (has_begun if call.token_ids else call.status), (call.error, call)
            assert call.status in (has_begun, 503), (call.error, call)
            outcomes[f"{call.status} {call.error['message']}"] += 1
    # A survivor that a starved machine does not run for 3 s is lost too: 503 until it is back, which is counted.
    assert outcomes["answered"] > len(WORKERS) * NUM_CLIENTS, outcomes
    assert_nothing_is_held(cluster)
    ask_unloaded(cluster)
    print(f"{len(load.calls)} requests: {dict(outcomes)}")
