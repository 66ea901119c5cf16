"""A trio whose decode worker has blocks half as large as the prefill worker's: what arrives passes through staging."""

from __future__ import annotations

import pytest
from support.links.shell_pair import ShellTrio
from support.model.engine_pair import LAYOUT
from support.oracles.cache_oracle import tiny_layout

from disagg.transceiver.planes import reshaping
from disagg.transceiver.protocol import outbox


class UnequalTrio(ShellTrio):
    layouts = {  # noqa: RUF012 (never changed)
        "decode": tiny_layout(6, 6, None, 11, block_size=LAYOUT.block_size // 2, num_sink_tokens=3, max_model_len=200)
    }


def patched_slices(patch: pytest.MonkeyPatch) -> None:
    """Slices of one unit, and staging that holds one of each group: every slice waits for the one before it."""
    patch.setattr(outbox, "SLICE_NBYTES", 1)
    patch.setattr(reshaping, "SLICE_NBYTES", 1)
    patch.setattr(reshaping, "STAGED_SLICES", 1)
