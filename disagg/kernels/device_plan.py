"""What the Triton kernels read of a step's batch: integers on the device, the same for every layer of a group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels.batch import NULL_SLOT, PagedBatch, num_seen
from disagg.kernels.upload import upload
from disagg.kernels.workspace import Workspace

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Integer tensors are int32 on the pool's device.

    `table` `[num_runs, width]`: slots of the blocks that each run attends to, sink blocks first, padded with the NULL
    slot. `runs` `[num_runs, 4]`: flat index of the run's first query, number of queries, position of the first, shift.
    The i-th block of a run's table has ordinal i or, past the sinks, i + shift / block_size. `write_slots` and
    `write_offsets` `[num_queries]`: slot and token within the block where each query's K and V are stored.
    `decode_tiles` `[n, 2]`: (run, 0) of runs of one query. `longest` is the most keys any of those runs attends to.
    """

    table: torch.Tensor
    runs: torch.Tensor
    write_slots: torch.Tensor
    write_offsets: torch.Tensor
    decode_tiles: torch.Tensor
    longest: int
    window: int | None
    num_sink_tokens: int
    block_size: int
    workspace: Workspace
    _long: tuple[tuple[int, int], ...]  # (run, num_queries) of longer runs
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def has_prefill(self) -> bool:
        return bool(self._long)

    def prefill_tiles(self, num_queries: int) -> torch.Tensor:
        """`[n, 2]`: (run, first query) of tiles of `num_queries` that cover the runs of several queries.

        How many fit a tile depends on the query heads per kv head, which the first layer to ask knows.
        """
        if num_queries not in self._tiles:
            tiles = [(run, first) for run, total in self._long for first in range(0, total, num_queries)]
            array = np.array(tiles, np.int32).reshape(-1, 2)
            self._tiles[num_queries] = upload(array, self.table.device)
        return self._tiles[num_queries]


def device_plan(batch: PagedBatch, pool: torch.Tensor, workspace: Workspace) -> DevicePlan:
    """The plan of `batch`, copied to the pool's device in one piece."""
    lists = [batch.ordinals(run) if run.num_queries else np.empty(0, np.int64) for run in batch.runs]
    width = max([len(ordinals) for ordinals in lists], default=0)
    table = np.full((len(lists), width), NULL_SLOT, np.int32)
    runs = np.zeros((len(lists), 4), np.int32)
    flat = np.cumsum([0, *(run.num_queries for run in batch.runs)])
    for number, (run, ordinals) in enumerate(zip(batch.runs, lists, strict=True)):
        table[number, : len(ordinals)] = batch.slots(run, ordinals)
        shift = (int(ordinals[-1]) + 1 - len(ordinals)) * batch.block_size if len(ordinals) else 0
        runs[number] = flat[number], run.num_queries, run.start, shift
    decode = [(number, 0) for number, run in enumerate(batch.runs) if run.num_queries == 1]
    starts = np.array([batch.runs[number].start for number, _ in decode], np.int64)
    longest = int(num_seen(starts, batch.window, batch.num_sink_tokens).max(initial=0))
    pieces = [table, runs, *_writes(batch), np.array(decode, np.int32).reshape(-1, 2)]
    table_, runs_, write_slots, write_offsets, decode_tiles = _on_device(pieces, pool.device)
    return DevicePlan(
        table_,
        runs_,
        write_slots,
        write_offsets,
        decode_tiles,
        longest,
        batch.window,
        batch.num_sink_tokens if batch.window is not None else 0,
        batch.block_size,
        workspace,
        tuple((number, run.num_queries) for number, run in enumerate(batch.runs) if run.num_queries > 1),
    )


def _writes(batch: PagedBatch) -> tuple[Int32, Int32]:
    slots, offsets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for run in batch.runs:
        positions = np.arange(run.start, run.end)
        slots.append(batch.slots(run, positions // batch.block_size))
        offsets.append(positions % batch.block_size)
    return np.concatenate(slots).astype(np.int32), np.concatenate(offsets).astype(np.int32)


def _on_device(pieces: list[Int32], device: torch.device) -> list[torch.Tensor]:
    """One copy for all of them: small copies cost as much as large ones.

    Each begins at 16 bytes: kernels are compiled for aligned pointers, and once more for others.
    """
    sizes = [-(-piece.size // 4) * 4 for piece in pieces]
    whole = np.zeros(sum(sizes), np.int32)
    starts = np.cumsum([0, *sizes])
    for start, piece in zip(starts, pieces, strict=False):
        whole[start : start + piece.size] = piece.ravel()
    there = upload(whole, device)
    return [there[start : start + piece.size].view(piece.shape) for start, piece in zip(starts, pieces, strict=False)]
