"""Log-probabilities of a prompt's tokens as JSON: vLLM's `prompt_logprobs`, and what `echo` puts before the answer's.

Encoded a few positions at a time, with a turn of the event loop for others between them: prompts are long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from disagg.api.answers.logprobs import LogprobFormat
from disagg.api.http.json_pieces import Encoded, encode_json
from disagg.api.request.params import RequestParams
from disagg.api.text.detokenizer import Detokenizer
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.values import TokenLogprobs

POSITIONS: Final = 16  # encoded between two turns, about 0.5 ms with 20 likely tokens each

Row = tuple[int, int, TokenLogprobs | None]
"""Token id, its rank (1 = the likeliest), its log-probabilities; the first token of a prompt has none."""


@dataclass(slots=True)
class ScoredPrompt:
    """`entries`: one item per token, `null` for the first. `echoed`: the four lists of completions' `logprobs`.

    Both are empty where they are not asked for.
    """

    entries: Encoded = field(default_factory=Encoded)
    echoed: dict[str, Encoded] = field(default_factory=dict)

    @classmethod
    async def of(
        cls,
        ids: Sequence[int],
        parts: Iterable[PromptLogprobs],
        params: RequestParams,
        tokens: LogprobFormat,
        detokenizer: Detokenizer,
    ) -> ScoredPrompt:
        scored, offset = cls(), 0
        async for token_id, rank, logprobs in _rows(ids, parts):
            if (count := params.prompt_logprobs) is not None:
                scored.entries.append(encode_json(tokens.ranked(token_id, rank, logprobs, count)))
            if params.echo and params.num_logprobs is not None:
                scored._echo(tokens.echoed(token_id, logprobs, params.num_logprobs, offset))
                offset += len(detokenizer.push(token_id))
        return scored

    def _echo(self, items: dict[str, Any]) -> None:
        for name, item in items.items():
            self.echoed.setdefault(name, Encoded()).append(encode_json(item))


async def _rows(ids: Sequence[int], parts: Iterable[PromptLogprobs]) -> AsyncIterator[Row]:
    yield ids[0], 0, None
    for part in parts:
        for position, (rank, logprobs) in enumerate(part.rows(), part.start):
            if position % POSITIONS == 0:
                await asyncio.sleep(0)
            yield ids[position], rank, logprobs
