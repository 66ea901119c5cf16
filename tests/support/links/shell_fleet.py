"""A router and any workers in one process, each behind proxies of its own, with prefix caches of one cluster key.

As `ShellTrio`: real shells over real sockets, real engines on tiny pools, a runner whose tokens tell what KV it read.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from support.faults.gates import PATIENCE_S
from support.faults.wrong import Wrong
from support.links.message_proxy import MessageProxy
from support.links.shell_pair import IDENTITY, KEYS, Links, ShellWorker, let_go, trio_context, until
from support.model.engine_pair import LAYOUT, ROOM, greedy
from support.model.fake_runner import reference_tokens

from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout
from disagg.router.choose import Placement, Unplaceable
from disagg.router.generation import GenerationEnd, GenerationRequest
from disagg.router.router import Router, RouterOptions
from disagg.worker import put_off

HASHER = BlockHasher(KEYS.prefix_hash, IDENTITY.model_fingerprint)
TWO_BY_TWO = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


class ShellFleet:
    """Use `start`, then `ask`; `close` in the end. `layouts`, `num_slots`: by worker, where they are not the usual."""

    def __init__(
        self,
        plane: str,
        roles: Mapping[str, str],
        *,
        layouts: Mapping[str, CacheLayout] | None = None,
        num_slots: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.plane, self.roles = plane, roles
        self.layouts, self.num_slots = layouts or {}, num_slots or {}
        self.workers: dict[str, ShellWorker] = {}
        self.links: dict[str, Links] = {}
        self.wrong: list[str] = []
        self._serial = 0
        self.forced: tuple[str, str | None] | None = None
        """(server, prefill worker) of the next requests, where a test says so."""

    async def start(self) -> None:
        self._router_stack = contextlib.AsyncExitStack()
        opened = Router.open("tcp://127.0.0.1:0", KEYS, RouterOptions(policy="least-loaded"))
        self.router = await self._router_stack.enter_async_context(opened)
        self._force_placements()
        for name, role in self.roles.items():
            await self.start_worker(name, role)
        await until(self.is_whole, "all workers are linked")

    async def start_worker(self, name: str, role: str) -> None:
        is_zmtp = self.plane not in ("tcp", "ucx")
        links = Links(MessageProxy(delay_s=0.1), MessageProxy(delay_s=0.1, is_zmtp=is_zmtp), {role: MessageProxy()})
        for proxy in links.all:
            await proxy.start()
        links.router[role].target = self.router.endpoint
        worker = ShellWorker(
            role, links, self.plane, name, self.layouts.get(name, LAYOUT), HASHER, self.num_slots.get(name, ROOM)
        )
        worker.wrong, worker.is_proxied = self.wrong, True
        self.workers[name], self.links[name] = worker, links
        for other in self.workers.values():
            other.sources = tuple(self.workers.values())
        worker.start()

    async def close(self) -> None:
        for links in self.links.values():
            for proxy in links.all:
                proxy.flow()
        for worker in self.workers.values():
            await worker.close()
        await self._router_stack.aclose()
        for links in self.links.values():
            for proxy in links.all:
                await proxy.close()

    async def kill(self, name: str) -> None:
        """To the others it is dead at once."""
        worker, links = self.workers.pop(name), self.links.pop(name)
        for proxy in links.all:
            proxy.cut(down=True)
        await worker.close()
        for proxy in links.all:
            await proxy.close()

    def incarnation(self, name: str) -> str:
        return str(self.workers[name].registration.node.incarnation)

    def is_whole(self) -> bool:
        if not all(hasattr(worker, "registration") for worker in self.workers.values()):
            return False
        if {worker.worker_id for worker in self.router.cluster.registry} != set(self.workers):
            return False
        return all(self._is_linked(worker) for worker in self.workers.values())

    def _is_linked(self, worker: ShellWorker) -> bool:
        registered = self.router.cluster.registry.named(worker.name)
        others = [self.incarnation(name) for name in self.workers if name != worker.name]
        known = [peer for peer in others if registered is not None and registered.link_state(peer) == "ready"]
        receiving = getattr(worker.registration, "_attempts", None) and worker.receiving
        return bool(receiving) and all(receiving.links.get(peer) is None or peer in known for peer in others)

    # --- requests -------------------------------------------------------------------------------------------

    def _force_placements(self) -> None:
        placing = self.router._placing
        make = placing.at

        def at(now: float, *rest: Any) -> Any:
            found = make(now, *rest)
            place = found.place

            def forced(max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
                if self.forced is None:
                    return place(max_tokens, exclude)
                targets = [self.router.cluster.registry.named(name) if name else None for name in self.forced]
                if any(t is not None and t.incarnation in exclude for t in targets) or targets[0] is None:
                    return place(max_tokens, exclude)
                return Placement(targets[0].target, targets[1].target if targets[1] is not None else None)

            found.place = forced
            return found

        placing.at = at  # type: ignore[method-assign]

    def at_random(self, rng: random.Random) -> None:
        """The next request goes to a random pair."""
        prefills = [name for name in self.workers if self.roles[name] in ("prefill", "both")]
        decodes = [name for name in self.workers if self.roles[name] in ("decode", "both")]
        server = rng.choice(decodes)
        self.forced = server, rng.choice([name for name in prefills if name != server])

    async def ask(self, prompt: Sequence[int], max_tokens: int = 6, **sampling: Any) -> tuple[int, ...]:
        """A right answer, whole."""
        self._serial += 1
        asked = greedy(max_tokens, ignore_eos=True, **sampling)
        request = GenerationRequest(f"request-{self._serial}", tuple(prompt), asked)
        tokens: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            generation = self.router.generate(request)
            async for item in generation:
                if not isinstance(item, GenerationEnd):
                    tokens += item.token_ids
        expected = reference_tokens(LAYOUT, request.prompt, request.sampling)
        if tokens != expected:
            self.wrong.append(f"{request.request_id}: a wrong answer: {tokens}, expected {expected}")
            raise Wrong(self.wrong[-1])
        return tuple(tokens)

    def record(self) -> Mapping[str, Any]:
        """Of the last request."""
        record = self.router.record(f"request-{self._serial}")
        assert record is not None
        return record

    # --- looking --------------------------------------------------------------------------------------------

    def num_computed(self) -> int:
        """Prompt tokens, of all workers."""
        return sum(worker.engine.stats().prompt_tokens_computed for worker in self.workers.values())

    def counted(self, name: str, **labels: str) -> float:
        """A counter of the workers, summed."""
        wanted = set(labels.items())
        return sum(
            value
            for worker in self.workers.values()
            for (counter, has), value in worker.parts.metrics._counters.items()
            if counter == name and wanted <= set(has)
        )

    def leftovers(self) -> dict[str, Any]:
        left = {name: some for name, worker in self.workers.items() if (some := self._left_at(worker))}
        if legs := self.router._lenders._legs:
            left |= {"legs": dict(legs)} if len(legs) > 64 else {}
        return left

    def _left_at(self, worker: ShellWorker) -> dict[str, Any]:
        left = worker.leftovers()
        attempts = getattr(worker.registration, "_attempts", None)
        if attempts is not None:
            left |= {"sinks": len(attempts.sinks), "granted": tuple(attempts.sources or ())}
        left["loans"] = len(worker.engine._lending._units)
        return {name: value for name, value in left.items() if value}

    async def settle(self) -> None:
        await let_go(self.leftovers)

    def check(self) -> None:
        for worker in self.workers.values():
            assert not worker.deaths, worker.deaths
        assert not self.wrong, self.wrong
        self.router.check_invariants()


@contextlib.contextmanager
def fleet_context(plane: str, scale: float = 1.0) -> Iterator[None]:
    """What a fleet needs while it lives. Prompts wait for prefixes however long: tiny ones are computed in no time."""
    with trio_context(plane, scale), pytest.MonkeyPatch.context() as patch:
        patch.setattr(put_off, "SHARE_OF_COMPUTING", 1e6)
        patch.setattr(put_off, "FIRST_LATENCY_S", 1.0)
        yield


@contextlib.asynccontextmanager
async def fleet(plane: str, roles: Mapping[str, str] = TWO_BY_TWO, **options: Any) -> Any:
    """A running fleet; in the end nothing is left behind, and no answer was wrong."""
    with fleet_context(plane):
        running = ShellFleet(plane, roles, **options)
        try:
            await running.start()
            yield running
            await running.settle()
            running.check()
        finally:
            await running.close()
