"""What pools of so many slots leave for kept prefixes: the slots above those that one running sequence takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg.cache.admission import peak_slots
from disagg.cache.layout import CacheLayout, LayerGroup
from disagg.cache.pool import NUM_RESERVED_SLOTS
from disagg.cache.window import num_live


@dataclass(frozen=True, slots=True)
class ReuseRoom:
    """One pool, in slots, beside one sequence of the maximum length that runs alone.

    `groups`: names of its layer groups. `usable`: all slots but the reserved ones. `running`: the most that the
    sequence takes at once; a shorter one takes less of a full group. `prefix`: the fewest that go on being useful, the
    window and sinks of one prefix (one block in a full group).
    """

    groups: tuple[str, ...]
    usable: int
    running: int
    prefix: int

    @property
    def left(self) -> int:
        return max(0, self.usable - self.running)

    @property
    def keeps_a_prefix(self) -> bool:
        return self.left >= self.prefix


def reuse_room(
    layout: CacheLayout, num_slots: Sequence[int], *, max_model_len: int, step_tokens: int
) -> tuple[ReuseRoom, ...]:
    """Per pool. `num_slots` as in `KVCache`: the reserved ones included. `step_tokens`: the most of one step."""
    step = min(max_model_len, step_tokens)
    running = peak_slots(layout, total_tokens=max_model_len, history=0, step_tokens=step)
    return tuple(
        ReuseRoom(
            groups=tuple(group.name for group in _groups_of(layout, pool)),
            usable=count - NUM_RESERVED_SLOTS,
            running=peak,
            prefix=sum(_least_prefix(group, layout.block_size) for group in _groups_of(layout, pool)),
        )
        for pool, (count, peak) in enumerate(zip(num_slots, running, strict=True))
    )


def _groups_of(layout: CacheLayout, pool: int) -> list[LayerGroup]:
    return [group for group, at in zip(layout.groups, layout.pool_of_group, strict=True) if at == pool]


def _least_prefix(group: LayerGroup, block_size: int) -> int:
    """Blocks from which computing can go on after a prefix of whole blocks that is longer than sinks and window."""
    if group.window is None:
        return 1
    whole = -(-(group.window + group.num_sink_tokens) // block_size) * block_size + block_size
    return max(1, num_live(whole, whole, group.window, group.num_sink_tokens, block_size))
