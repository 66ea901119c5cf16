"""What one prompt holds and moves, per layer group: the same layout, windows and transfer plan that workers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disagg.cache.layout import CacheLayout
from disagg.cache.scratch import num_scratch_slots, scratch_range, scratch_until
from disagg.cache.window import num_live
from disagg.transceiver.layout.required import full_copy_nbytes, moved_nbytes, required_units
from disagg.transceiver.wire.messages.values import GroupRuns


@dataclass(frozen=True, slots=True)
class GroupFootprint:
    """One layer group's part. `slot_bytes`: one block of all its `layers` (model layer indexes).

    `required_blocks`: ordinals that must move to a decode worker which holds the first `cached_tokens` (whole blocks
    count); `bytes`: theirs. `live_slots`: blocks held when the prompt is computed; `scratch_slots`: those beside them
    during the prefill step that takes most.
    """

    name: str
    window: int | None
    sink_tokens: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str
    slot_bytes: int
    required_blocks: tuple[int, ...]
    cached_tokens: int
    bytes: int
    full_copy_bytes: int
    live_slots: int
    scratch_slots: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """One prompt in every group. `full_copy_bytes`: what moving every block of every group would take."""

    block_size: int
    prompt_len: int
    groups: tuple[GroupFootprint, ...]

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)

    @property
    def full_copy_bytes(self) -> int:
        return sum(group.full_copy_bytes for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes, "full_copy_bytes": self.full_copy_bytes}


def footprint(
    layout: CacheLayout,
    prompt_len: int,
    *,
    cached_tokens: Mapping[str, int],
    max_num_batched_tokens: int | None = None,
    swa_scratch: str = "off",
) -> Footprint:
    """`cached_tokens`: by group name, prompt tokens that the receiver holds. A prompt is one step unless told less.

    `swa_scratch` as the engine's; scratch slots are counted where the layout has pages for them.

    Raises ValueError, one sentence, for a group that does not exist or more cached tokens than the prompt has.
    """
    _check_cached(layout, prompt_len, cached_tokens)
    size = layout.block_size
    blocks = [cached_tokens.get(group.name, 0) // size for group in layout.groups]
    required = required_units(layout.groups, prompt_len, size, [range(count) for count in blocks])
    steps = _steps(prompt_len, min(prompt_len, max_num_batched_tokens or prompt_len), swa_scratch, size)
    kept_from = prompt_len if swa_scratch == "on" else prompt_len // size * size  # a longer prompt may go on from there
    groups = tuple(
        _group(layout, number, prompt_len, units, count * size, kept_from, _most_scratch_slots(layout, number, steps))
        for number, (units, count) in enumerate(zip(required, blocks, strict=True))
    )
    return Footprint(size, prompt_len, groups)


def _check_cached(layout: CacheLayout, prompt_len: int, cached_tokens: Mapping[str, int]) -> None:
    names = [group.name for group in layout.groups]
    for name, count in cached_tokens.items():
        if name not in names:
            raise ValueError(f"`{name}` is no layer group of this model, which has {', '.join(names) or 'none'}")
        if count > prompt_len:
            raise ValueError(f"`{name}={count}`: the prompt has {prompt_len} tokens, no more can be cached")


def _group(
    layout: CacheLayout,
    number: int,
    prompt_len: int,
    units: GroupRuns,
    cached_tokens: int,
    kept_from: int,
    scratch_slots: int,
) -> GroupFootprint:
    group, size = layout.groups[number], layout.block_size
    slot_nbytes = group.slot_nbytes(size)
    return GroupFootprint(
        name=group.name,
        window=group.window,
        sink_tokens=group.num_sink_tokens,
        layers=group.layers,
        kv_heads=group.num_kv_heads,
        head_dim=group.head_dim,
        dtype=group.dtype,
        slot_bytes=slot_nbytes,
        required_blocks=tuple(o for first, count in units.runs for o in range(first, first + count)),
        cached_tokens=cached_tokens,
        bytes=moved_nbytes([units], {number: slot_nbytes}),
        full_copy_bytes=full_copy_nbytes(prompt_len, size, [slot_nbytes]),
        live_slots=num_live(prompt_len, kept_from, group.window, group.num_sink_tokens, size),
        scratch_slots=scratch_slots,
    )


def _steps(prompt_len: int, step: int, swa_scratch: str, block_size: int) -> list[tuple[int, int, int]]:
    """(history, capacity, stale_at) of each step of a prefill in chunks of `step`, as `scratch_range` takes them."""
    ends = [min(start + step, prompt_len) for start in range(0, prompt_len, step)]
    return [
        (number * step, end, scratch_until(swa_scratch, prompt_len, end, block_size)) for number, end in enumerate(ends)
    ]


def _most_scratch_slots(layout: CacheLayout, number: int, steps: Sequence[tuple[int, int, int]]) -> int:
    """In the step that takes most."""
    group, pages = layout.groups[number], layout.scratch_pages(number)
    if pages == 0:
        return 0
    ranges = (scratch_range(*step, group.window, group.num_sink_tokens, layout.block_size) for step in steps)
    return max(num_scratch_slots(len(blocks), pages) for blocks in ranges)
