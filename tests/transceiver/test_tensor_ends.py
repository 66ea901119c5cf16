"""Foreign engines' tensors through the whole protocol: FETCH, slices, digests, MAC, ticket; two ends in one loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.event_loop import in_event_loop, within
from support.links.pools import close_pools, make_pools
from support.oracles.element_walk import element

from disagg.transceiver.library.tensor_ends import Model, TensorDestination, TensorSource
from disagg.transceiver.memory.foreign_layout import ForeignLayer
from disagg.transceiver.memory.foreign_pools import ForeignPools
from disagg.transceiver.wire.errors import PeerLost, TransferFailed
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import AttemptKey, GroupSemantics
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.sockets import Sockets

KEYS = ClusterKeys.from_secret(b"a secret that both processes know")
GROUPS = (
    GroupSemantics(window=None, num_sink_tokens=0, num_kv_heads=2, head_dim=4, layers=(0, 3)),
    GroupSemantics(window=10, num_sink_tokens=2, num_kv_heads=2, head_dim=4, layers=(1, 2)),
)
MODEL = Model("a model", "float32", 64, GROUPS)
PROMPT = tuple(range(100, 135))
NUM_BLOCKS = 24


@dataclass
class End:
    """Tensors of both groups, and where the sequence's blocks lie in them, all of them."""

    axes: str
    dtype: str
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        extent = {"s": NUM_BLOCKS, "h": 2, "t": self.block_size, "d": 4, "k": 2, "D": 8}
        shape = [extent[axis] for axis in self.axes]
        self.layers: list[dict[int, ForeignLayer]] = []
        for group in GROUPS:
            one = {layer: torch.zeros(shape, dtype=getattr(torch, self.dtype)) for layer in group.layers}
            is_pair = not {"k", "D"} & set(self.axes)
            self.layers.append({layer: (t, t.clone()) if is_pair else t for layer, t in one.items()})
        self.pools = ForeignPools.of(self.layers, self.axes, dtype=self.dtype)
        count = -(-len(PROMPT) // self.block_size)
        draw = torch.Generator().manual_seed(self.seed)
        self.tables = [dict(enumerate(torch.randperm(NUM_BLOCKS, generator=draw)[:count].tolist())) for _ in GROUPS]

    def at(self, group: int, layer: int, token: int, h: int, d: int, k: int) -> tuple[torch.Tensor, Any]:
        block = self.tables[group][token // self.block_size]
        held = self.layers[group][layer]
        tensor = held[k] if isinstance(held, tuple) else held
        return tensor, element(tensor, self.axes, {"s": block, "t": token % self.block_size, "h": h, "d": d, "k": k})

    def fill(self) -> None:
        for place in places(range(len(PROMPT))):
            tensor, index = self.at(*place)
            tensor[index] = truth(*place)


def places(tokens: range | set[int]) -> list[tuple[int, int, int, int, int, int]]:
    return [
        (number, layer, token, h, d, k)
        for number, group in enumerate(GROUPS)
        for layer in group.layers
        for token in tokens
        for h in range(2)
        for d in range(4)
        for k in (0, 1)
    ]


def truth(group: int, layer: int, token: int, h: int, d: int, k: int) -> float:
    """Whole numbers up to 256 are exact in every format here."""
    return float((token * 7 + layer * 31 + h * 64 + d * 11 + k * 128 + group) % 257)


def is_read(group: int, token: int) -> bool:
    """By a query after the prompt."""
    semantics = GROUPS[group]
    if semantics.window is None:
        return True
    return token < semantics.num_sink_tokens or token > len(PROMPT) - semantics.window


@contextlib.asynccontextmanager
async def linked(sender: End, receiver: End) -> AsyncIterator[tuple[TensorSource, TensorDestination]]:
    async with (
        TensorSource.open(MODEL, sender.pools, KEYS) as source,
        TensorDestination.open(MODEL, receiver.pools, KEYS, source.target) as destination,
    ):
        yield source, destination


async def move(source: TensorSource, destination: TensorDestination, sender: End, receiver: End) -> Any:
    key = AttemptKey(draw_id(), 1)
    sending = asyncio.create_task(source.send(key, PROMPT, 7, sender.tables, destination.peer))
    try:
        found = await within(destination.fetch(key, PROMPT, receiver.tables))
        await within(sending)
        return found
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.parametrize(
    ("sender", "receiver"),
    [
        (("shtD", "bfloat16", 8), ("sthd", "float32", 4)),
        (("sthd", "float32", 4), ("skhtd", "bfloat16", 8)),
        (("kshtd", "float32", 4), ("shtdk", "float32", 4)),  # of one geometry, and of no one memory
    ],
)
@in_event_loop
async def test_every_number_that_is_read_arrives_under_the_whole_protocol(
    sender: tuple[str, str, int], receiver: tuple[str, str, int]
) -> None:
    ours, theirs = End(*receiver, seed=2), End(*sender, seed=1)
    theirs.fill()
    async with linked(theirs, ours) as (source, destination):
        for _ in range(2):
            first, record = await move(source, destination, theirs, ours)
            assert first.token_id == 7
            assert record.plane == "tcp"
            for place in places(range(len(PROMPT))):
                if is_read(place[0], place[2]):
                    tensor, index = ours.at(*place)
                    assert float(tensor[index]) == truth(*place), place


@in_event_loop
async def test_the_other_end_may_be_our_pools_whose_slots_are_the_units() -> None:
    theirs = End("shtD", "float32", 4, 1)
    theirs.fill()
    node = MODEL.node(theirs.pools, KEYS, "one of ours")
    (nbytes,) = node.geometry.slot_nbytes
    pools = make_pools([(40, nbytes)])
    tables = [{ordinal: 2 + ordinal + 12 * group for ordinal in theirs.tables[group]} for group in (0, 1)]
    sockets = Sockets(KEYS)
    async with TensorSource.open(MODEL, theirs.pools, KEYS) as source:
        ours = TensorDestination(node, pools, source.target, sockets)
        running = asyncio.create_task(ours._ranks.run())
        await ours._link(5.0)
        key = AttemptKey(draw_id(), 1)
        sending = asyncio.create_task(source.send(key, PROMPT, 7, theirs.tables, ours.peer))
        await within(ours.fetch(key, PROMPT, tables))
        await within(sending)
        running.cancel()
        await asyncio.wait({running})
    sockets.close()
    slots = torch.from_numpy(pools[0].slots).view(torch.float32).view(40, 2, 2, 2, 4, 4)
    for group, layer, token, h, d, k in places(range(len(PROMPT))):
        if is_read(group, token):
            slot, at = tables[group][token // 4], GROUPS[group].layers.index(layer)
            assert float(slots[slot, at, k, h, token % 4, d]) == truth(group, layer, token, h, d, k)
    close_pools(pools)


@in_event_loop
async def test_bytes_that_change_after_their_hash_are_refused() -> None:
    theirs, ours = End("shtD", "float32", 8, 1), End("shtD", "float32", 8, 2)
    theirs.fill()
    async with linked(theirs, ours) as (source, destination):
        hashing = source._ranks._landing[0]
        digest_units = hashing.digest_units

        async def then_flip(*args: Any) -> Any:
            units = await digest_units(*args)
            tensor, index = theirs.at(0, 0, 20, 1, 3, 1)
            tensor[index] += 1
            return units

        hashing.digest_units = then_flip  # type: ignore[method-assign]
        with pytest.raises(TransferFailed, match="digest"):
            await move(source, destination, theirs, ours)
        hashing.digest_units = digest_units  # type: ignore[method-assign]
        await move(source, destination, theirs, ours)


@in_event_loop
async def test_a_block_given_away_before_it_left_ends_the_transfer() -> None:
    theirs, ours = End("sthD", "float32", 4, 1), End("shtD", "float32", 8, 2)
    theirs.fill()
    async with linked(theirs, ours) as (source, destination):
        key = AttemptKey(draw_id(), 1)
        hashing, is_hashed = source._ranks._landing[0], asyncio.Event()
        digest_units = hashing.digest_units

        async def then_tell(*args: Any) -> Any:
            units = await digest_units(*args)
            is_hashed.set()
            return units

        hashing.digest_units = then_tell  # type: ignore[method-assign]
        sending = asyncio.create_task(source.send(key, PROMPT, 7, theirs.tables, destination.peer))
        await within(is_hashed.wait())
        theirs.pools[0].generations[theirs.tables[0][3]] += 1
        with pytest.raises(TransferFailed):
            await within(destination.fetch(key, PROMPT, ours.tables))
        await within(sending)


@in_event_loop
async def test_engines_of_unlike_models_are_not_linked() -> None:
    theirs, ours = End("shtD", "float32", 8, 1), End("shtD", "float32", 8, 2)
    async with TensorSource.open(MODEL, theirs.pools, KEYS) as source:
        other = replace(MODEL, name="another model")
        with pytest.raises(PeerLost, match="model_fingerprint"):
            async with TensorDestination.open(other, ours.pools, KEYS, source.target, link_s=1.0):
                pass


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ForeignPools.of([{0: torch.zeros(4, 2, 8, 8), 1: torch.zeros(5, 2, 8, 8)}], "shtD", dtype="float32")
