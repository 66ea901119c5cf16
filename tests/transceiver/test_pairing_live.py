"""Every field in which two workers may differ, over real sockets: what cannot convert is refused by its name."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.event_loop import in_event_loop

from disagg.transceiver.layout.ranks import natural_slot_nbytes
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.link import PeerLink
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.planes.inproc import InprocHub, InprocLandingPlane, InprocSourcePlane
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets

KEYS = ClusterKeys.published()
IDENTITY = Identity(1, "f" * 32, "attention", "float32", 200, KEYS.hash_key_id)
GROUPS = (GroupSemantics(None, 0, 2, 4, (0, 3)), GroupSemantics(24, 4, 4, 4, (1, 2)))
BASE = Geometry(16, "float32", GROUPS, (2 * 2 * 2 * 16 * 4 * 4, 2 * 2 * 4 * 16 * 4 * 4))
ONES = tuple(((((1.0,) * g.num_kv_heads,) * 2),) * len(g.layers) for g in GROUPS)


def cut(**changes: Any) -> Geometry:
    """A geometry that is consistent in itself."""
    changed = replace(BASE, **changes)
    return replace(changed, slot_nbytes=natural_slot_nbytes(changed))


REFUSED = {
    "protocol_major": replace(IDENTITY, protocol_major=2),
    "model_fingerprint": replace(IDENTITY, model_fingerprint="0" * 32),
    "attention": replace(IDENTITY, attention="another"),
    "compute_dtype": replace(IDENTITY, compute_dtype="bfloat16"),
    "max_model_len": replace(IDENTITY, max_model_len=100),
    "hash_key_id": replace(IDENTITY, hash_key_id="0" * 16),
    "adapter_ids": replace(IDENTITY, adapter_ids=("lora",)),
    "block_size": cut(block_size=24),
    "kv_dtype": replace(BASE, kv_dtype="float64"),
    "groups[1].window": cut(groups=(GROUPS[0], replace(GROUPS[1], window=25))),
    "groups[1].num_sink_tokens": cut(groups=(GROUPS[0], replace(GROUPS[1], num_sink_tokens=0))),
    "groups[0].num_kv_heads": cut(groups=(replace(GROUPS[0], num_kv_heads=4), GROUPS[1])),
    "groups[0].head_dim": cut(groups=(replace(GROUPS[0], head_dim=8), GROUPS[1])),
    "groups[0].layers": cut(groups=(replace(GROUPS[0], layers=(0, 4)), GROUPS[1])),
    "groups": replace(BASE, groups=GROUPS[:1]),
    "slot_nbytes": replace(BASE, slot_nbytes=(64, 128)),
    "tensor_parallel_size": cut(tensor_parallel_size=2),
    "pipeline_parallel_size": cut(pipeline_parallel_size=2, stages=((0, 1), (2, 3))),
    "slot_layout": replace(BASE, slot_layout="layer-kv-token-head-dim"),
    "kv_scales": replace(BASE, kv_scales=ONES),
    "stages": cut(stages=((0, 1, 2, 3),)),
    "rank": replace(BASE, rank=1),
}
PAIRED = {
    "smaller blocks": cut(block_size=4),
    "larger blocks": cut(block_size=64),
    "bf16": cut(kv_dtype="bfloat16"),
    "fp16 in smaller blocks": cut(kv_dtype="float16", block_size=8),
    "fp8": cut(kv_dtype="float8_e4m3fn"),
    "fp8 with scales": cut(kv_dtype="float8_e4m3fn", kv_scales=ONES),
}
NUM_SLOTS = 4


class Host:
    """Nobody fetches anything here."""

    def pin(self, key: Any) -> None: ...
    def release_source(self, key: Any, reason: str) -> None: ...
    def unregister(self, key: Any, units: Any) -> None: ...


def pools(geometry: Geometry) -> tuple[PoolRegion, ...]:
    return tuple(
        PoolRegion(np.zeros((NUM_SLOTS, nbytes), np.uint8), np.zeros(NUM_SLOTS, np.uint64), -1, 0)
        for nbytes in natural_slot_nbytes(geometry)
    )


async def state_of_link(identity: Identity, geometry: Geometry) -> tuple[str, str]:
    """(state, detail) that a decode worker with these says of its link to one with ours, once it is settled."""
    hub, sockets = InprocHub(), Sockets(KEYS)
    source, server = InprocSourcePlane(hub), ControlServer.bind("tcp://127.0.0.1:0", KEYS, sockets)
    ours = Node(draw_id(), "prefill", IDENTITY, BASE, KEYS)
    await source.start(pools(BASE))
    side = SendingSide(ours, server, {"inproc": source}, Host(), pools(BASE))
    link = PeerLink(
        Node(draw_id(), "decode", identity, geometry, KEYS),
        PeerTarget(ours.incarnation, "prefill", server.endpoint, BASE),
        {"inproc": lambda: InprocLandingPlane(hub)},
        pools(geometry if geometry in PAIRED.values() else BASE),
        lambda message: None,
        _nothing_to_lose,
        lambda peer: (),
        sockets,
    )
    tasks = [asyncio.create_task(side.run()), asyncio.create_task(link.run())]
    try:
        async with asyncio.timeout(10):
            while link.report().state not in ("ready", "refused"):  # noqa: ASYNC110 - a link has no event for it
                await asyncio.sleep(0.002)
        return link.report().state, link.report().detail
    finally:
        link.end()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await source.close()
        await server.close()
        sockets.close()


async def _nothing_to_lose(peer: str, reason: str) -> None: ...


@pytest.mark.parametrize("field", REFUSED)
@in_event_loop
async def test_what_cannot_convert_is_refused_by_its_name(field: str) -> None:
    other = REFUSED[field]
    pair = (other, BASE) if isinstance(other, Identity) else (IDENTITY, other)
    state, detail = await state_of_link(*pair)
    assert state == "refused"
    assert detail.startswith(f"{field}: ours "), detail


@pytest.mark.parametrize("name", PAIRED)
@in_event_loop
async def test_what_converts_is_linked(name: str) -> None:
    assert await state_of_link(IDENTITY, PAIRED[name]) == ("ready", "")
