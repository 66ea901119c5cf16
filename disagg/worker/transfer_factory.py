"""Builds the pure cores of one incarnation's transfers from what the router dispatched."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from disagg.cache.layout import CacheLayout
from disagg.transceiver.events import Reserved
from disagg.transceiver.messages.router import Dispatch
from disagg.transceiver.messages.values import GroupBytes, GroupRuns
from disagg.transceiver.node import Node
from disagg.transceiver.plan import full_copy_blocks, runs_of
from disagg.transceiver.receiving import TransferRecord
from disagg.transceiver.transfer import Transfer


class TransferFactory:
    """`planes`: the planes this worker serves as a sender, each with whether it pushes bytes."""

    def __init__(self, node: Node, layout: CacheLayout, planes: Mapping[str, bool]) -> None:
        self._node, self._layout, self._planes = node, layout, planes
        self._unit_nbytes = tuple(layout.slot_nbytes[pool] for pool in layout.pool_of_group)

    @property
    def worker_id(self) -> str:
        return self._node.worker_id

    def sender(self, dispatch: Dispatch) -> Transfer:
        """The prefill end of a `prefill` dispatch."""
        assert dispatch.peer is not None
        return Transfer.sender(
            transfer_id=dispatch.transfer_id,
            epoch=dispatch.epoch,
            me=self._node.incarnation,
            peer=dispatch.peer.incarnation,
            prompt=dispatch.prompt,
            geometry=self._node.geometry,
            unit_nbytes=self._unit_nbytes,
            planes=self._planes,
            keys=self._node.keys,
            deadline_s=dispatch.deadline_s,
            now=time.monotonic(),
        )

    def receiver(self, dispatch: Dispatch, plane: str) -> Transfer:
        """The decode end of a `decode` dispatch, over the plane agreed with the peer."""
        assert dispatch.peer is not None
        return Transfer.receiver(
            transfer_id=dispatch.transfer_id,
            epoch=dispatch.epoch,
            me=self._node.incarnation,
            peer=dispatch.peer.incarnation,
            ticket=dispatch.ticket,
            plane=plane,
            geometry=self._node.geometry,
            keys=self._node.keys,
            deadline_s=dispatch.deadline_s,
            now=time.monotonic(),
        )

    def reserved(self, dispatch: Dispatch, slots: Sequence[Sequence[tuple[int, int]]]) -> Reserved:
        """The FETCH to make: exactly the ordinals that have a destination."""
        required = tuple(
            GroupRuns(group, runs_of(np.array([ordinal for ordinal, _ in pairs], dtype=np.int64)))
            for group, pairs in enumerate(slots)
        )
        return Reserved(required, len(dispatch.prompt))

    def group_bytes(self, dispatch: Dispatch, record: TransferRecord) -> tuple[GroupBytes, ...]:
        """What landed per group, beside what a copy of every block of the prompt would have been."""
        blocks = full_copy_blocks(len(dispatch.prompt), self._layout.block_size)
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
