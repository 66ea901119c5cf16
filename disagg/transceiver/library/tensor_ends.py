"""Moving KV between two engines' own tensors: a source in one process, a destination in the other, and the protocol.

The engines talk over their own channel: the source's `target` must reach the destination, and the destination's `peer`
the source. The rest is here: HELLO, FETCH, slices as they were asked for, digests of every unit, one MAC over all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disagg.cache.window import needed_ordinals
from disagg.transceiver.layout.units import SourceUnit, peer_unit
from disagg.transceiver.library.decode_ranks import DecodeRank, DecodeRanks
from disagg.transceiver.library.prefill_ranks import DecodePeer, PrefillRank, PrefillRanks
from disagg.transceiver.memory.foreign_pools import ForeignPools
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.planes.reshaping import probe_pools
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane
from disagg.transceiver.planes.tcp.source import TcpSourcePlane
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.protocol.leader import Outcome, Pair, part_key
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.errors import PeerLost, TransferFailed
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import (
    AttemptKey,
    FirstToken,
    Geometry,
    GroupSemantics,
    Identity,
    SamplingState,
)
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets, bracketed

_PAIR: Pair = (0, 0)  # one rank on each side

Tables = Sequence[Mapping[int, int]]
"""Per layer group, the sequence's blocks: ordinal -> block number."""


@dataclass(frozen=True, slots=True)
class Model:
    """What both engines must agree on. `name` stands for weights and attention: equal names, equal numbers."""

    name: str
    compute_dtype: str
    max_model_len: int
    groups: tuple[GroupSemantics, ...]

    def node(self, pools: ForeignPools, keys: ClusterKeys, worker_id: str) -> Node:
        identity = Identity(1, self.name, self.name, self.compute_dtype, self.max_model_len, keys.hash_key_id)
        return Node(draw_id(), worker_id, identity, pools.geometry(self.groups), keys)


class TensorSource:
    """Sends finished prompts out of tensors, over tcp."""

    def __init__(self, rank: PrefillRank) -> None:
        node = rank.node
        self.target = PeerTarget(node.incarnation, node.worker_id, rank.server.endpoint, node.geometry)
        self._rank = rank
        self._ranks = PrefillRanks([rank], self._release)
        self._released: dict[AttemptKey, asyncio.Event] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, model: Model, pools: ForeignPools, keys: ClusterKeys, *, host: str = "127.0.0.1"
    ) -> AsyncIterator[TensorSource]:
        """Listen on `host`, until the end of the context. Raises `EndpointRefused`."""
        node, plane = model.node(pools, keys, "source"), TcpSourcePlane(host, keys)
        async with contextlib.AsyncExitStack() as stack:
            server = ControlServer.bind(f"tcp://{bracketed(host)}:0", keys)
            stack.push_async_callback(server.close)
            stack.push_async_callback(plane.close)
            await plane.start(probe_pools(node.geometry))
            source = cls(PrefillRank(node, pools, server, {plane.name: plane}))
            await stack.enter_async_context(_running(source._ranks.run()))
            yield source

    async def send(
        self,
        key: AttemptKey,
        prompt: tuple[int, ...],
        first_token: int,
        tables: Tables,
        peer: DecodePeer,
        *,
        deadline_s: float = 60.0,
    ) -> None:
        """Offer the prompt's blocks to `peer`; returns when it needs them no more, or will never fetch them."""
        units = [
            SourceUnit(group, ordinal, group, block, int(self._rank.pools[group].generations[block]))
            for group, table in enumerate(tables)
            for ordinal, block in sorted(table.items())
        ]
        released = self._released[part_key(key, _PAIR)] = asyncio.Event()
        first = FirstToken(first_token, None, SamplingState(0))
        await self._ranks.serve(key, prompt, first, [peer], [_PAIR], [units], deadline_s=deadline_s)
        await released.wait()

    def _release(self, key: AttemptKey) -> None:
        self._released.pop(key).set()


class TensorDestination:
    """Fetches prompts of one source into tensors."""

    def __init__(self, node: Node, pools: Sequence[PoolRegion], source: PeerTarget, sockets: Sockets) -> None:
        self.peer = DecodePeer(node.incarnation, node.geometry)
        self._node, self._source = node, source
        planes = {TcpLandingPlane.name: TcpLandingPlane}
        self._ranks = DecodeRanks([DecodeRank(node, pools)], [source], planes, sockets, self._decide)
        self._decided: dict[AttemptKey, asyncio.Future[tuple[Outcome, TransferRecord]]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, model: Model, pools: ForeignPools, keys: ClusterKeys, source: PeerTarget, *, link_s: float = 10.0
    ) -> AsyncIterator[TensorDestination]:
        """Link to `source`, until the end of the context. Raises `PeerLost` when there is no link after `link_s`."""
        sockets = Sockets(keys)
        try:
            destination = cls(model.node(pools, keys, "destination"), pools, source, sockets)
            async with _running(destination._ranks.run()):
                await destination._link(link_s)
                yield destination
        finally:
            sockets.close()

    async def _link(self, link_s: float) -> None:
        try:
            async with asyncio.timeout(link_s):
                while not self._ranks.is_ready:  # noqa: ASYNC110 - a link has no event for it
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise PeerLost(f"no link to {self._source.endpoint}: {'; '.join(self._ranks.details())}") from None

    async def fetch(
        self, key: AttemptKey, prompt: tuple[int, ...], tables: Tables, *, deadline_s: float = 60.0
    ) -> tuple[FirstToken, TransferRecord]:
        """Fill the blocks of `tables` that the tokens after the prompt read; with the first token and what it cost.

        Whatever lies in the blocks is no KV unless this returns. Raises `TransferFailed` with the reason.
        """
        ours, theirs = self._node.geometry, self._source.geometry
        wanted = units_of(ours, peer_unit(ours, theirs.block_size if theirs else 0), len(prompt), tables)
        ids = part_key(key, _PAIR)
        grant = ticket.mint(
            self._node.keys.ticket,
            transfer_id=ids.transfer_id,
            epoch=ids.epoch,
            prefill=self._source.incarnation,
            decode=self._node.incarnation,
            prompt=prompt,
            ttl_s=deadline_s,
        )
        decided = self._decided[key] = asyncio.get_running_loop().create_future()
        self._ranks.start(key, len(prompt), [wanted], {_PAIR: grant}, deadline_s=deadline_s)
        decision, record = await decided
        if not isinstance(decision, Verified):
            raise TransferFailed(f"transfer {key.transfer_id}: {decision.reason}")
        return decision.first_token, record

    def _decide(self, key: AttemptKey, decision: Outcome, records: Mapping[Pair, TransferRecord]) -> None:
        decided = self._decided.pop(key)
        if not decided.done():  # else no caller waits any more
            decided.set_result((decision, records[_PAIR]))


def units_of(geometry: Geometry, unit: int, prompt_len: int, tables: Tables) -> list[list[tuple[int, int]]]:
    """Per group, (ordinal of a unit, block) of what a transfer brings into these blocks."""
    per_block = geometry.block_size // unit
    found = []
    for group, table in zip(geometry.groups, tables, strict=True):
        need = needed_ordinals(prompt_len, group.window, group.num_sink_tokens, unit).tolist()
        found.append([(n, table[n // per_block]) for n in need if n // per_block in table])
    return found


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` beside the body, and ended with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
