"""What passed between DISPATCH and the licence to decode, for `/requests/{id}`."""

from __future__ import annotations

from collections.abc import Iterator

from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.wire.messages.values import StageTimes
from disagg.worker.request_state import RequestState


def stage_times(state: RequestState, record: TransferRecord) -> StageTimes:
    """What an attempt whose KV landed here waited for."""
    return StageTimes(tuple(_stages(state, record)))


def _stages(state: RequestState, record: TransferRecord) -> Iterator[tuple[str, float]]:
    """queue | transfer_wait | wire | verify: what passed between DISPATCH and the licence to decode, without a gap."""
    reserved_at = state.reserved_at or state.arrived_at
    first = record.first_slice_at or record.done_at
    landed = max(first, record.landed_at)
    yield "queue", reserved_at - state.arrived_at
    yield "transfer_wait", first - reserved_at
    yield "wire", landed - first
    yield "verify", record.done_at - landed
