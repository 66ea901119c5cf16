"""What passed between DISPATCH and the licence to decode, for `/requests/{id}`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.wire.messages.router import TransferReport
from disagg.transceiver.wire.messages.values import StageTimes
from disagg.worker.request_state import RequestState


def report_of(state: RequestState, times: StageTimes, record: TransferRecord | None) -> TransferReport:
    """This worker's part of the attempt; `record` where KV landed here."""
    key = state.key
    report = TransferReport(key.transfer_id, key.epoch, state.pairing.worker_id, "", (), times)
    if record is None:
        return report
    moved = {"plane": record.plane, "purpose": record.purpose, "num_operations": record.num_operations}
    return replace(report, groups=state.pairing.group_bytes(record), **moved)  # type: ignore[arg-type]  # by name


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
