"""What a worker computes before it says that it is ready, so that no request waits for a compiler."""

from __future__ import annotations

import logging
import time

from disagg.cache.cache import KVCache
from disagg.engine.run.runner import Chunk, StepRunner

log = logging.getLogger(__name__)

NUM_TOKENS = 33
"""Of the prompt: several blocks and more than one tile of queries in most models."""


def warm_up(runner: StepRunner, cache: KVCache, max_model_len: int) -> None:
    """A prompt, and a token behind it: the kernels of both kinds of step are compiled. Their KV is forgotten.

    A pool or a model too small for either is left to its requests.
    """
    started, count = time.monotonic(), min(NUM_TOKENS, max_model_len - 1)
    sequence = cache.open("warm-up")
    try:
        for start, end in ((0, count), (count, count + 1)):
            if end > start and cache.resize(sequence, capacity=end, history=start):
                runner.execute([Chunk(sequence.tables, [0] * (end - start), start, True)])
    finally:
        cache.close_sequence(sequence)
    log.info("warmed up with a prompt of %d tokens and one more in %.1f s", count, time.monotonic() - started)
