"""A runner whose logits are a pure function of the tokens it can read back from the cache.

It stores (token + 1, position) as K and V of every layer, then for each chunk reads, through the block tables, all keys
that the last query attends, and hashes them. A block that is missing, swapped, stale or shared shows as other tokens.
`reference_tokens` computes the same answer from the token list alone, with no cache at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from support.oracles.cache_oracle import attends

from disagg.cache.cache import KVCache
from disagg.cache.layout import CacheLayout
from disagg.cache.scratch import page_table
from disagg.engine.run.runner import Chunk
from disagg.engine.sampler import SampleInput, sample
from disagg.transceiver.wire.messages.values import Sampling

VOCAB_SIZE = 40
Reading = list[tuple[int, int, int]]
"""(layer, token + 1, position) of each key that was attended."""


class FakeRunner:
    """`poison`: a token whose KV and whose readers' logits are NaN. `batches`: (start, count, wants) per chunk."""

    def __init__(self, cache: KVCache, poison: int | None = None) -> None:
        self.cache, self.poison = cache, poison
        self.pages = [cache.page_view(number) for number in range(cache.layout.num_groups)]
        layers = sorted(layer for group in cache.layout.groups for layer in group.layers)
        self.places = [(layer, *cache.layout.place(layer)) for layer in layers]
        self.batches: list[list[tuple[int, int, bool]]] = []

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        assert drawn is None, "a `LateDevice` fills tokens in"
        self.batches.append([(chunk.start, len(chunk.token_ids), chunk.wants_logits) for chunk in chunks])
        readings: list[list[Reading | None]] = [[[] for _ in chunk.token_ids] for chunk in chunks]
        for layer, number, position in self.places:
            for chunk, found in zip(chunks, readings, strict=True):
                self._run_layer(chunk, layer, number, position, found)
        rows = [_row(found) for found in readings]
        for chunk, found in zip(chunks, readings, strict=True):
            if chunk.scoring is not None:
                for end in range(1, chunk.scoring.num_rows + 1):
                    chunk.scoring.add(_row(found[:end])[None])
        wanted = [row for chunk, row in zip(chunks, rows, strict=True) if chunk.wants_logits]
        return torch.stack(wanted) if wanted else torch.empty(0, VOCAB_SIZE)

    def _run_layer(self, chunk: Chunk, layer: int, number: int, position: int, readings: list[Reading | None]) -> None:
        """One layer stores the chunk's tokens, then each query reads, as in a model: scratch blocks live no longer."""
        scratch = chunk.scratch[number] if chunk.scratch else None
        num_layers = len(self.cache.layout.groups[number].layers)
        table, pages = page_table(chunk.tables[number], scratch, num_layers, position), self.pages[number]
        for offset, token in enumerate(chunk.token_ids):
            self._write(table, pages, chunk.start + offset, token)
        for offset, reading in enumerate(readings):
            if reading is not None:
                readings[offset] = self._read(table, pages, layer, number, chunk.start + offset, reading)

    def _write(self, table: np.ndarray, pages: torch.Tensor, position: int, token: int) -> None:
        ordinal, offset = divmod(position, self.cache.layout.block_size)
        value = float("nan") if token == self.poison else token + 1.0
        assert table[ordinal] >= 2, "a token is written where no block is"
        pages[int(table[ordinal]), :, 0, offset] = torch.tensor([value, float(position)])

    def _read(
        self, table: np.ndarray, pages: torch.Tensor, layer: int, number: int, query: int, reading: Reading
    ) -> Reading | None:
        """`reading` with what this query attends in one layer; None if any of it is not a number."""
        group = self.cache.layout.groups[number]
        for key in range(query + 1):
            if not attends(query, key, group.window, group.num_sink_tokens):
                continue
            ordinal, offset = divmod(key, self.cache.layout.block_size)
            assert table[ordinal] >= 2, f"query {query} attends key {key}, whose block is gone"
            (k, k_position), (v, v_position) = pages[int(table[ordinal]), :, 0, offset].tolist()
            if not np.isfinite([k, v]).all():
                return None
            reading.append((layer, int(k) if k == v else -1, int(k_position + v_position) // 2))
        return reading


def _row(readings: list[Reading | None]) -> torch.Tensor:
    """What the last query read decides; that an earlier one read a key twice or from elsewhere shows too."""
    if any(reading is None for reading in readings):
        return torch.full((VOCAB_SIZE,), float("nan"))
    torn = [r for r in readings[:-1] if r is not None and not _is_whole(r)]
    last = readings[-1]
    assert last is not None
    return hashed_logits([*last, *((-1, -1, -1) for _ in torn)])


def _is_whole(reading: Reading) -> bool:
    """Each layer's keys stand in order, each once."""
    places = [(layer, position) for layer, _, position in reading]
    return len(set(places)) == len(places)


def hashed_logits(reading: Reading) -> torch.Tensor:
    """Float32 [VOCAB_SIZE], a pure function of what was read."""
    digest = hashlib.blake2b(repr(sorted(reading)).encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return torch.from_numpy(generator.standard_normal(VOCAB_SIZE).astype(np.float32))


def reference_logits(layout: CacheLayout, tokens: Sequence[int]) -> torch.Tensor:
    """Logits after `tokens`, from the list itself."""
    query = len(tokens) - 1
    reading = [
        (layer, tokens[key] + 1, key)
        for group in layout.groups
        for key in range(len(tokens))
        if attends(query, key, group.window, group.num_sink_tokens)
        for layer in group.layers
    ]
    return hashed_logits(reading)


def reference_tokens(layout: CacheLayout, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The answer of a model that keeps everything and knows no blocks, stops included."""
    tokens, stops = list(prompt), set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops |= set(sampling.eos_token_ids)
    while len(tokens) - len(prompt) < sampling.max_tokens:
        row = SampleInput(sampling, len(tokens), prompt, tokens[len(prompt) :])
        tokens.append(sample(reference_logits(layout, tokens)[None], [row])[0].token_id)
        if tokens[-1] in stops and len(tokens) - len(prompt) >= sampling.min_tokens:
            break
    return tokens[len(prompt) :]
