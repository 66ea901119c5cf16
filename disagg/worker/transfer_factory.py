"""Builds the pure cores of one incarnation's transfers from what the router dispatched."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from disagg.cache.layout import CacheLayout
from disagg.cache.window import needed_ordinals
from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import full_copy_blocks, runs_of
from disagg.transceiver.layout.strides import ELEMENT_NBYTES
from disagg.transceiver.layout.units import geometry_by_units, peer_unit
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.events import Reserved
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.router import Dispatch
from disagg.transceiver.wire.messages.values import Geometry, GroupBytes, GroupRuns, UnitName
from disagg.transceiver.wire.node import Node

Slots = Sequence[Sequence[tuple[int, int]]]
"""Per group, (ordinal, slot) pairs."""


class TransferFactory:
    """`planes`: the planes this worker serves as a sender, each with whether it pushes bytes."""

    def __init__(self, node: Node, layout: CacheLayout, planes: Mapping[str, bool]) -> None:
        self._node, self._layout, self._planes = node, layout, planes

    @property
    def worker_id(self) -> str:
        return self._node.worker_id

    def fits(self, dispatch: Dispatch) -> bool:
        """Is there a peer, and are there units that both ends can count in?"""
        try:
            self.unit(dispatch)
        except RemoteProtocolError:
            return False
        return dispatch.peer is not None

    def unit(self, dispatch: Dispatch) -> int:
        """Tokens per unit with the dispatch's peer: the finer of both block sizes. Raises `RemoteProtocolError`."""
        return peer_unit(self._node.geometry, self.peer_geometry(dispatch).block_size)

    def peer_geometry(self, dispatch: Dispatch) -> Geometry:
        """How the dispatch's peer lays out its cache: as we do, unless it is said otherwise."""
        peer = dispatch.peer
        return peer.geometry if peer is not None and peer.geometry is not None else self._node.geometry

    def precision(self, dispatch: Dispatch) -> str:
        """What the numbers have been through when they come from the dispatch's peer; "" = nothing but our own format.

        A decode worker must not take them for what it would have computed, nor for what comes from other formats.
        """
        ours, theirs = self._node.geometry, self.peer_geometry(dispatch)
        if (ours.kv_dtype, ours.kv_scales) == (theirs.kv_dtype, theirs.kv_scales):
            return ""
        return f"{theirs.kv_dtype}:{blake2b(repr(theirs.kv_scales).encode(), digest_size=8).hexdigest()}"

    def sender(self, dispatch: Dispatch) -> Transfer:
        """The prefill end of a `prefill` dispatch."""
        assert dispatch.peer is not None
        return Sender(
            Ends(dispatch.transfer_id, dispatch.epoch, self._node.incarnation, dispatch.peer.incarnation),
            Offer(
                prompt=dispatch.prompt,
                geometry=geometry_by_units(self._node.geometry, self.unit(dispatch)),
                unit_nbytes=self._unit_nbytes(dispatch),
                planes=self._planes,
                keys=self._node.keys,
                ttl_s=dispatch.deadline_s,
                part=Part.whole(geometry_by_units(self._node.geometry, self.unit(dispatch)).groups),
            ),
            time.monotonic(),
        )

    def receiver(self, dispatch: Dispatch, plane: str) -> Transfer:
        """The decode end of a `decode` dispatch, over the plane agreed with the peer."""
        assert dispatch.peer is not None
        return Receiver(
            Ends(dispatch.transfer_id, dispatch.epoch, self._node.incarnation, dispatch.peer.incarnation),
            Order(
                ticket=dispatch.ticket,
                plane=plane,
                geometry=geometry_by_units(self._node.geometry, self.unit(dispatch)),
                keys=self._node.keys,
                deadline_s=dispatch.deadline_s,
                part=Part.whole(geometry_by_units(self._node.geometry, self.unit(dispatch)).groups),
            ),
            time.monotonic(),
        )

    def destinations(self, dispatch: Dispatch, slots: Slots) -> tuple[list[tuple[int, int]], ...]:
        """(ordinal of a unit, slot) pairs per group for reserved (ordinal of a block, slot) pairs: what is needed."""
        unit = self.unit(dispatch)
        per_slot = self._layout.block_size // unit
        found = []
        for group, pairs in zip(self._layout.groups, slots, strict=True):
            need = needed_ordinals(len(dispatch.prompt), group.window, group.num_sink_tokens, unit).tolist()
            slot_of = dict(pairs)
            found.append([(n, slot_of[n // per_slot]) for n in need if n // per_slot in slot_of])
        return tuple(found)

    def partial_blocks(self, dispatch: Dispatch, slots: Slots) -> tuple[UnitName, ...]:
        """Reserved blocks of which only some units will come: they serve this request and must not be reused.

        The last block lacks nothing that the prompt has not: it is whole once it is filled here.
        """
        unit = self.unit(dispatch)
        per_slot, num_units = self._layout.block_size // unit, -(-len(dispatch.prompt) // unit)
        counts = [Counter(n // per_slot for n, _ in pairs) for pairs in self.destinations(dispatch, slots)]
        return tuple(
            UnitName(group, block)
            for group, count in enumerate(counts)
            for block, num_coming in count.items()
            if num_coming < min(per_slot, num_units - block * per_slot)
        )

    def reserved(self, dispatch: Dispatch, slots: Slots) -> Reserved:
        """The FETCH to make: exactly the ordinals of units that have a destination."""
        required = tuple(
            GroupRuns(group, runs_of(np.array([ordinal for ordinal, _ in pairs], dtype=np.int64)))
            for group, pairs in enumerate(slots)
        )
        return Reserved(required, len(dispatch.prompt))

    def group_bytes(self, dispatch: Dispatch, record: TransferRecord) -> tuple[GroupBytes, ...]:
        """What landed per group, beside what a copy of every block of the prompt would have been."""
        blocks = full_copy_blocks(len(dispatch.prompt), self.unit(dispatch))
        unit_nbytes = self._unit_nbytes(dispatch)
        return tuple(
            GroupBytes(
                number,
                group.name,
                record.blocks.get(number, 0),
                record.nbytes.get(number, 0),
                blocks,
                blocks * unit_nbytes[number],
            )
            for number, group in enumerate(self._layout.groups)
        )

    def _unit_nbytes(self, dispatch: Dispatch) -> tuple[int, ...]:
        """Per group, on the wire."""
        ours = self._node.geometry
        element = min(ELEMENT_NBYTES[ours.kv_dtype], ELEMENT_NBYTES[self.peer_geometry(dispatch).kv_dtype])
        per_slot = ours.block_size // self.unit(dispatch) * ELEMENT_NBYTES[ours.kv_dtype]
        return tuple(ours.slot_nbytes[pool] * element // per_slot for pool in self._layout.pool_of_group)
