"""A process that is a prefill worker of several ranks: a real prompt, computed once, cut into the pools of each rank.

The engine computes on one rank; heads and layers are dealt out here by plain indexing, which shares no code with the
planner. `Cut` says how either side is cut.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.oracles.element_walk import heads_of

from disagg.cache.cache import KVCache
from disagg.cache.layout import derive_layout
from disagg.cache.pool import SlotPool
from disagg.engine.model.kv_dtype import resolve_kv_dtype
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.runner import Chunk, Runner
from disagg.transceiver.layout.ranks import natural_slot_nbytes, rank_geometry
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.library.prefill_ranks import PrefillRank, PrefillRanks
from disagg.transceiver.memory.regions import PoolRegion
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
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.plane_classes import source_planes

KEYS = ClusterKeys.from_secret(b"the secret of ranks")
MAX_MODEL_LEN = 256
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Cut:
    """How one side is cut. `kv_dtype` as the flag names it; `scale`: of K; V has twice that, heads a little more."""

    block_size: int
    kv_dtype: str = "float32"
    tensor_ranks: int = 1
    num_stages: int = 1
    scale: float = 1.0
    claimed_scale: float = 0.0
    """What HELLO says, where that is a lie."""

    def scales(self, layer: int, num_heads: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        key = tuple(float(np.float32(self.scale * (1 + layer / 8 + head / 16))) for head in range(num_heads))
        return key, tuple(2 * scale for scale in key)


@dataclass(frozen=True)
class Job:
    """One prompt through one pair of cuts over one plane."""

    folder: Path
    prompt: tuple[int, ...]
    sender: Cut
    receiver: Cut
    plane: str
    num_sink_tokens: int = 0
    key: AttemptKey = field(default_factory=lambda: AttemptKey(draw_id(), 1))


@cache
def _load(folder: Path, kv_dtype: str) -> LoadedModel:
    return load_model(folder, dtype="float32", kv_cache_dtype=kv_dtype)


def model_of(job: Job, cut: Cut) -> LoadedModel:
    """The model with this side's cache, and with sink tokens in windowed layers where the job has them."""
    model = _load(job.folder, cut.kv_dtype)
    is_fp8 = resolve_kv_dtype(cut.kv_dtype, "float32") == "float8_e4m3fn"
    layers = [
        replace(
            layer,
            num_sink_tokens=job.num_sink_tokens if layer.window else 0,
            scales=cut.scales(layer.index, layer.num_kv_heads) if is_fp8 else None,
        )
        for layer in model.layers
    ]
    return replace(model, layers=tuple(layers))


def make_cache(model: LoadedModel, block_size: int) -> KVCache:
    layout = derive_layout(model.layers, block_size=block_size, max_model_len=MAX_MODEL_LEN)
    return KVCache(layout, [3 * MAX_MODEL_LEN // block_size + 4] * layout.num_pools)


def geometries_of(cache: KVCache, cut: Cut) -> list[Geometry]:
    """Of every rank of a worker with this cache, if it were cut."""
    groups = tuple(
        GroupSemantics(g.window, g.num_sink_tokens, g.num_kv_heads, g.head_dim, g.layers) for g in cache.layout.groups
    )
    scales = tuple(group.scales for group in cache.layout.groups)
    if cut.claimed_scale:
        factor = cut.claimed_scale / cut.scale
        scales = tuple(
            tuple((tuple(factor * s for s in k), tuple(factor * s for s in v)) for k, v in group) for group in scales
        )
    dtype = cache.layout.groups[0].dtype
    whole = Geometry(cut.block_size, dtype, groups, cache.layout.slot_nbytes, kv_scales=scales if any(scales) else ())
    layers = sorted(layer for group in groups for layer in group.layers)
    stages = [part.tolist() for part in np.array_split(layers, cut.num_stages)]
    return [
        rank_geometry(whole, rank, tensor_parallel_size=cut.tensor_ranks, stages=stages)
        for rank in range(cut.tensor_ranks * cut.num_stages)
    ]


@dataclass
class RankPools:
    """One rank's pools, its part of each group as tensors `[slot, layer, half, head, token, dim]`, and its tables."""

    geometry: Geometry
    pools: list[SlotPool]
    views: list[torch.Tensor | None]
    places: list[list[int]]
    heads: list[list[int]]
    tables: list[dict[int, int]]

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        sides = [pool.sides for pool in self.pools]
        return tuple(PoolRegion(side.host.numpy(), side.generations, side.fd, side.slots_offset) for side in sides)

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def make_rank(geometry: Geometry, ordinals: Sequence[Sequence[int]], seed: int) -> RankPools:
    """Slots in random order for `ordinals[group]`, where this rank holds some of the group."""
    rank, stage = geometry.rank % geometry.tensor_parallel_size, geometry.rank // geometry.tensor_parallel_size
    dtype = getattr(torch, geometry.kv_dtype)
    pools = [SlotPool(nbytes, sum(map(len, ordinals)) + 8) for nbytes in natural_slot_nbytes(geometry)]
    made = RankPools(geometry, pools, [], [], [], [])
    for group, wanted in zip(geometry.groups, ordinals, strict=True):
        places = [p for p, layer in enumerate(group.layers) if layer in geometry.stages[stage]]
        heads = heads_of(rank, geometry.tensor_parallel_size, group.num_kv_heads)
        made.places.append(places)
        made.heads.append(heads)
        if not places:
            made.views.append(None)
            made.tables.append({})
            continue
        shape = (len(places), 2, len(heads), geometry.block_size, group.head_dim)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        pool = pools[natural_slot_nbytes(geometry).index(nbytes)]
        slots = pool.allocate(len(wanted))
        random.Random(seed).shuffle(slots)
        made.views.append(pool.memory.view(dtype).view(pool.num_slots, *shape))
        made.tables.append(dict(zip(wanted, slots, strict=True)))
    return made


def needed_tokens(group: GroupSemantics, prompt_len: int) -> set[int]:
    """Prompt tokens that the next queries read, by looking at each."""
    window = group.window or MAX_MODEL_LEN
    return {
        token
        for token in range(prompt_len)
        if token < group.num_sink_tokens or token > prompt_len - window or group.window is None
    }


def needed_ordinals(group: GroupSemantics, prompt_len: int, size: int) -> list[int]:
    return sorted({token // size for token in needed_tokens(group, prompt_len)})


def identity() -> Identity:
    return Identity(1, "tiny", "its own", "float32", MAX_MODEL_LEN, KEYS.hash_key_id)


# --- in the sender's process --------------------------------------------------------------------------------------


class Sender:
    """A prompt, computed; what each rank holds of it."""

    def __init__(self, job: Job) -> None:
        self.job, cut = job, job.sender
        model = model_of(job, cut)
        self.cache = make_cache(model, cut.block_size)
        sequence = self.cache.open("prompt")
        assert self.cache.resize(sequence, capacity=len(job.prompt), history=0)
        logits = Runner(model, self.cache).execute([Chunk(sequence.tables, job.prompt, 0, True)])
        self.first_token = int(logits[0].argmax())
        self.tables = sequence.tables
        groups = geometries_of(self.cache, cut)[0].groups
        ordinals = [needed_ordinals(group, len(job.prompt), cut.block_size) for group in groups]
        self.ranks = [make_rank(g, ordinals, seed) for seed, g in enumerate(geometries_of(self.cache, cut))]
        for rank in self.ranks:
            self._fill(rank)

    def _fill(self, rank: RankPools) -> None:
        for number, (view, table) in enumerate(zip(rank.views, rank.tables, strict=True)):
            whole = self.cache.group_view(number)
            for ordinal, slot in table.items():
                block = whole[int(self.tables[number][ordinal])]
                assert view is not None
                view.view(_raw(view))[slot] = block.view(_raw(view))[rank.places[number]][:, :, rank.heads[number]]

    def truth(self) -> list[torch.Tensor]:
        """What every stored number is worth, float32 `[layer, half, head, token, dim]` of each group."""
        found = []
        for number, group in enumerate(self.cache.layout.groups):
            blocks = self.cache.group_view(number)[torch.from_numpy(self.tables[number].astype(np.int64))].float()
            worth = blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
            if group.scales:
                worth = worth * torch.tensor(group.scales)[..., None, None]
            found.append(worth[:, :, :, : len(self.job.prompt)].contiguous())
        return found

    def sources(self, rank: RankPools) -> list[SourceUnit]:
        pools = natural_slot_nbytes(rank.geometry)
        return [
            SourceUnit(number, ordinal, pool, slot, int(rank.pools[pool].sides.generations[slot]))
            for number, (view, table) in enumerate(zip(rank.views, rank.tables, strict=True))
            if view is not None
            for pool in [pools.index(view[0].numel() * view.element_size())]
            for ordinal, slot in table.items()
        ]


def _raw(view: torch.Tensor) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16, 1: torch.uint8}[view.element_size()]


async def _serve(job: Job, pipe: Connection) -> None:
    sender, sockets = Sender(job), Sockets(KEYS)
    ranks = []
    for rank in sender.ranks:
        node = Node(draw_id(), f"prefill-{rank.geometry.rank}", identity(), rank.geometry, KEYS, joins_ranks=True)
        server = ControlServer.bind("tcp://127.0.0.1:0", KEYS, sockets)
        planes = source_planes((job.plane,), host="127.0.0.1", advertised_host="127.0.0.1", keys=KEYS)
        for plane in planes.values():
            await plane.start(rank.regions)
        ranks.append(PrefillRank(node, rank.regions, server, planes))
    targets = [PeerTarget(r.node.incarnation, r.node.worker_id, r.server.endpoint, r.node.geometry) for r in ranks]
    released: asyncio.Queue[AttemptKey] = asyncio.Queue()
    serving = PrefillRanks(ranks, released.put_nowait)
    running = asyncio.create_task(serving.run())
    pipe.send((targets, sender.first_token, [worth.numpy() for worth in sender.truth()]))
    peers, pairs = await asyncio.to_thread(pipe.recv)
    if pairs:
        first = FirstToken(sender.first_token, None, SamplingState(0))
        sources = [sender.sources(rank) for rank in sender.ranks]
        await serving.serve(job.key, job.prompt, first, peers, pairs, sources, deadline_s=DEADLINE_S)
        pipe.send("serving")
        for _ in pairs:
            await asyncio.wait_for(released.get(), DEADLINE_S)
        pipe.send("released")
        await asyncio.to_thread(pipe.recv)  # the other side has closed its links
    running.cancel()
    await asyncio.wait({running})
    for rank in ranks:
        for plane in rank.planes.values():
            await plane.close()
        await rank.server.close()
    sockets.close()
    for rank in sender.ranks:
        rank.close()
    sender.cache.close()


def _run(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        try:
            asyncio.run(_serve(job, pipe))
        except Exception as exc:  # the test is told, and the next job is served
            pipe.send(exc)


@dataclass
class SenderProcess:
    """The one process that serves all jobs of a test module, in turn."""

    pipe: Connection
    process: Any

    @classmethod
    def start(cls) -> SenderProcess:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(there,), daemon=True)
        process.start()
        there.close()
        return cls(here, process)

    async def recv(self) -> Any:
        """What it says next; what went wrong there is raised here."""
        said = await asyncio.to_thread(self.pipe.recv)
        if isinstance(said, Exception):
            raise said
        return said

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(20)
        assert self.process.exitcode == 0
