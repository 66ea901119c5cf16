"""What one dispatched attempt is between this worker and its peer: the unit, what is needed, and the transfer's end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np

from disagg.cache.layout import CacheLayout
from disagg.cache.window import needed_ordinals
from disagg.transceiver.layout.boundary import missing_at, ordinals_of
from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import full_copy_blocks, moved_nbytes, runs_of
from disagg.transceiver.layout.strides import ELEMENT_NBYTES
from disagg.transceiver.layout.units import geometry_by_units, peer_unit
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.events import Reserved
from disagg.transceiver.protocol.move_sink import MoveOrder, MoveSink
from disagg.transceiver.protocol.move_source import MoveOffer, MoveSource
from disagg.transceiver.protocol.prefix_sink import PrefixReceiver, Wanted
from disagg.transceiver.protocol.prefix_source import Lendable, PrefixSender
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.router import Dispatch
from disagg.transceiver.wire.messages.values import Geometry, GroupBytes, GroupRuns, UnitName
from disagg.transceiver.wire.node import Node

Slots = Sequence[Sequence[tuple[int, int]]]
"""Per group, (ordinal, slot) pairs."""


class Pairing:
    """This node and the peer of one dispatch. Made once per attempt: each answer is computed once.

    `planes`: those this worker serves as a sender, each with whether it pushes bytes.
    """

    def __init__(self, node: Node, layout: CacheLayout, planes: Mapping[str, bool], dispatch: Dispatch) -> None:
        self._node, self._layout, self._planes, self._dispatch = node, layout, planes, dispatch
        peer = dispatch.peer
        self.peer_geometry = peer.geometry if peer is not None and peer.geometry is not None else node.geometry
        """How the peer lays out its cache: as we do, unless it is said otherwise."""

    @property
    def worker_id(self) -> str:
        return self._node.worker_id

    @property
    def fits(self) -> bool:
        """Whether the dispatch names a peer, and one block size divides the other."""
        try:
            return self.unit > 0 and self._dispatch.peer is not None
        except RemoteProtocolError:
            return False

    @cached_property
    def unit(self) -> int:
        """Tokens per unit with the peer: the finer of both block sizes. Raises `RemoteProtocolError`."""
        return peer_unit(self._node.geometry, self.peer_geometry.block_size)

    @property
    def precision(self) -> str:
        """What the numbers have been through when they come from the peer; "" = nothing but our own format.

        A decode worker must not take them for what it would have computed, nor for what comes from other formats.
        """
        ours, theirs = self._node.geometry, self.peer_geometry
        if (ours.kv_dtype, ours.kv_scales) == (theirs.kv_dtype, theirs.kv_scales):
            return ""
        return f"{theirs.kv_dtype}:{blake2b(repr(theirs.kv_scales).encode(), digest_size=8).hexdigest()}"

    # --- the transfer's end ---------------------------------------------------------------------------------

    def sender(self) -> Sender:
        """The prefill end of a `prefill` dispatch."""
        return Sender(self._ends, self._offer, time.monotonic())

    def receiver(self, plane: str) -> Receiver:
        """The decode end of a `decode` dispatch, over the plane agreed with the peer."""
        return Receiver(self._ends, self._order(plane), time.monotonic())

    @property
    def coarser_block_size(self) -> int:
        """Of both ends'."""
        return max(self._node.geometry.block_size, self.peer_geometry.block_size)

    @property
    def is_exact(self) -> bool:
        """Whether blocks of the peer are what this worker would have computed: stored in the same numbers."""
        return self.fits and not self.precision

    def prefix_sender(self, tips: tuple[bytes, ...]) -> PrefixSender:
        """The source's end of a prefix, whose dispatch holds the granted tokens. `tips`: our blocks' names."""
        lendable = Lendable(
            self._dispatch.request_id, tips, self._node.geometry.block_size, self.peer_geometry.block_size
        )
        return PrefixSender(self._ends, self._offer, lendable, time.monotonic())

    def prefix_receiver(self, plane: str, own: int, held: tuple[GroupRuns, ...], tips: tuple[bytes, ...]) -> Receiver:
        """The sink's end of a prefix, whose dispatch holds the tokens to ask for. `tips`: the names of the
        peer's blocks.
        """
        ours, theirs = self._node.geometry.block_size, self.peer_geometry.block_size
        wanted = Wanted(len(self._dispatch.prompt), own, tips, held, ours, theirs)
        return PrefixReceiver(self._ends, self._order(plane), wanted, time.monotonic())

    def missing_nbytes(self, held: tuple[GroupRuns, ...]) -> int:
        """Of what a prefix would move at most, if all of its dispatch's tokens were to be had."""
        groups, ours = self._layout.groups, self._node.geometry.block_size
        missing = missing_at(groups, len(self._dispatch.prompt), self.unit, ordinals_of(held, len(groups)), ours)
        return moved_nbytes(missing, self._unit_nbytes)

    def move_source(self, request: str, num_tokens: int) -> MoveSource:
        """The end that decodes an answer of which the router has `num_tokens`."""
        return MoveSource(self._ends, MoveOffer(self._offer, request, num_tokens), time.monotonic())

    def move_sink(self, plane: str, dispatch: Dispatch) -> MoveSink:
        """The end that goes on with the answer, as the router's own `dispatch` says."""
        order = MoveOrder(self._order(plane), dispatch.transfer_id, dispatch.prompt, dispatch.first_output)
        return MoveSink(self._ends, order, time.monotonic())

    # --- what is reserved for it ----------------------------------------------------------------------------

    def destinations(self, slots: Slots) -> tuple[list[tuple[int, int]], ...]:
        """(ordinal of a unit, slot) pairs per group for reserved (ordinal of a block, slot) pairs: what is needed."""
        per_slot, slot_of = self._units_per_slot, [dict(pairs) for pairs in slots]
        return tuple(
            [(n, here[n // per_slot]) for n in need if n // per_slot in here]
            for need, here in zip(self._needed, slot_of, strict=True)
        )

    def partial_blocks(self, destinations: Slots) -> tuple[UnitName, ...]:
        """Reserved blocks of which only some units will come: they serve this request and must not be reused.

        The prompt's last block counts as whole when all of the prompt's units in it come: the rest is filled here.
        """
        per_slot, num_units = self._units_per_slot, -(-self._dispatch.num_known // self.unit)
        counts = [Counter(n // per_slot for n, _ in pairs) for pairs in destinations]
        return tuple(
            UnitName(group, block)
            for group, count in enumerate(counts)
            for block, num_coming in count.items()
            if num_coming < min(per_slot, num_units - block * per_slot)
        )

    def reserved_of(self, destinations: Slots) -> Reserved:
        """Of a prefix: the units that have a destination, of the groups that have any."""
        every = self.reserved(destinations)
        return Reserved(tuple(entry for entry in every.required if entry.runs), every.prompt_len)

    def reserved(self, destinations: Slots) -> Reserved:
        """The FETCH to make: exactly the ordinals of units that have a destination."""
        required = tuple(
            GroupRuns(group, runs_of(np.array([ordinal for ordinal, _ in pairs], dtype=np.int64)))
            for group, pairs in enumerate(destinations)
        )
        return Reserved(required, self._dispatch.num_known)

    def group_bytes(self, record: TransferRecord) -> tuple[GroupBytes, ...]:
        """What landed per group, beside what a copy of every block of the prompt would have been."""
        blocks = full_copy_blocks(self._dispatch.num_known, self.unit)
        return tuple(
            GroupBytes(
                number,
                group.name,
                record.blocks.get(number, 0),
                record.nbytes.get(number, 0),
                blocks,
                blocks * self._unit_nbytes[number],
            )
            for number, group in enumerate(self._layout.groups)
        )

    def held(self, slots: Slots) -> tuple[GroupRuns, ...]:
        """What is needed and has no slot among those reserved: it was found in the cache."""
        per_slot, reserved = self._units_per_slot, [{ordinal for ordinal, _ in pairs} for pairs in slots]
        return tuple(
            GroupRuns(group, runs_of(np.array([n for n in need if n // per_slot not in here], dtype=np.int64)))
            for group, (need, here) in enumerate(zip(self._needed, reserved, strict=True))
        )

    # --- cached facts ---------------------------------------------------------------------------------------

    @property
    def _offer(self) -> Offer:
        return Offer(
            prompt=self._dispatch.prompt,
            geometry=self._geometry,
            unit_nbytes=self._unit_nbytes,
            planes=self._planes,
            keys=self._node.keys,
            ttl_s=self._dispatch.deadline_s,
            output=self._dispatch.first_output,
            part=Part.whole(self._geometry.groups),
        )

    def _order(self, plane: str) -> Order:
        return Order(
            ticket=self._dispatch.ticket,
            plane=plane,
            geometry=self._geometry,
            keys=self._node.keys,
            deadline_s=self._dispatch.deadline_s,
            part=Part.whole(self._geometry.groups),
        )

    @property
    def _ends(self) -> Ends:
        dispatch = self._dispatch
        assert dispatch.peer is not None
        return Ends(dispatch.transfer_id, dispatch.epoch, self._node.incarnation, dispatch.peer.incarnation)

    @cached_property
    def _geometry(self) -> Geometry:
        return geometry_by_units(self._node.geometry, self.unit)

    @property
    def _units_per_slot(self) -> int:
        return self._layout.block_size // self.unit

    @cached_property
    def _needed(self) -> tuple[list[int], ...]:
        """Per group, the ordinals of units that decoding will read."""
        length, unit = self._dispatch.num_known, self.unit
        return tuple(
            needed_ordinals(length, group.window, group.num_sink_tokens, unit).tolist() for group in self._layout.groups
        )

    @cached_property
    def _unit_nbytes(self) -> tuple[int, ...]:
        """Per group, on the wire."""
        ours = self._node.geometry
        element = min(ELEMENT_NBYTES[ours.kv_dtype], ELEMENT_NBYTES[self.peer_geometry.kv_dtype])
        per_slot = ours.block_size // self.unit * ELEMENT_NBYTES[ours.kv_dtype]
        return tuple(ours.slot_nbytes[pool] * element // per_slot for pool in self._layout.pool_of_group)
