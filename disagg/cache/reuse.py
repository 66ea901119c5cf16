"""How much of a known prefix a sequence may use. Pure, over which blocks are resident; the tests walk positions.

`resident[g]`: bool [n], whether group g has the block of each of the n ordinals that the prefix tree knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from disagg.cache.layout import CacheLayout
from disagg.cache.window import Attends, needed_ordinals, sink_blocks

Resident = NDArray[np.bool_]


def usable_lengths(resident: Resident, group: Attends, block_size: int) -> NDArray[np.bool_]:
    """bool [n + 1]: whether the group could go on from k blocks, k = 0..n: all that is not stale at k*T is resident."""
    num_known = len(resident)
    lengths = np.arange(num_known + 1)
    absent = np.concatenate([[0], np.cumsum(~resident)])  # absent[k]: how many of the first k are missing
    first_live = np.zeros_like(lengths)
    sinks = 0
    if group.window is not None:
        sinks = sink_blocks(group.num_sink_tokens, block_size)
        first_live = np.clip((lengths * block_size + 1 - group.window) // block_size, sinks, None)
    front = np.minimum(lengths, sinks)
    is_tail_whole = absent[lengths] == absent[np.minimum(first_live, lengths)]
    usable: NDArray[np.bool_] = (absent[front] == 0) & is_tail_whole
    return usable


def longest_common(resident: Sequence[Resident], layout: CacheLayout, prompt_len: int) -> int:
    """Most blocks from which *all* groups can go on computing: the last token is always computed, for its logits."""
    if not resident:
        return 0  # without KV there is nothing to save
    limit = min(len(resident[0]), (prompt_len - 1) // layout.block_size)
    usable = np.ones(len(resident[0]) + 1, dtype=np.bool_)
    for group, known in zip(layout.groups, resident, strict=True):
        usable &= usable_lengths(known, group, layout.block_size)
    return int(np.flatnonzero(usable[: limit + 1])[-1])  # 0 blocks are always usable


def held_ordinals(resident: Resident, group: Attends, block_size: int, prompt_len: int) -> NDArray[np.int64]:
    """`have_g` of the protocol: the needed ordinals that are resident, whichever they are. int64, ascending.

    `resident` covers whole blocks of the prompt only, so the partly filled last one is never among them.
    """
    need = needed_ordinals(prompt_len, group.window, group.num_sink_tokens, block_size)
    need = need[need < len(resident)]
    held: NDArray[np.int64] = need[resident[need]]
    return held
