"""A runner whose model went through torch's compiler, around our attention, which stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from disagg.cache.cache import KVCache
from disagg.engine.model.cpu_layers import suit_cpu
from disagg.engine.model.load import LoadedModel
from disagg.engine.model.opaque_attention import COMPILED_ATTENTION_NAME, calling, tokens
from disagg.engine.run.runner import Runner
from disagg.kernels.dispatch import CALLS

log = logging.getLogger(__name__)

Int64 = npt.NDArray[np.int64]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# A compiler takes a size of 0 or 1 for a constant and compiles anew for others: with 2 at least, once serves all.
LEAST = 2


class CompiledRunner(Runner):
    """`Runner` with other insides of `_forward`. What cannot be compiled runs as it is, from the first step on."""

    def __init__(self, model: LoadedModel, cache: KVCache) -> None:
        super().__init__(model, cache)
        self._compiled: Forward | None = torch.compile(self._logits, fullgraph=True)

    @torch.inference_mode()
    def _forward(self, token_ids: torch.Tensor, positions: Int64, last: Int64) -> torch.Tensor:
        if self._compiled is None:
            return super()._forward(token_ids, positions, last)
        places = [torch.from_numpy(values).to(self.model.device) for values in (positions, last)]
        given = [self._padded(values) for values in (token_ids, *places)]
        try:
            with tokens(len(token_ids)), calling(COMPILED_ATTENTION_NAME, self.model.module):
                logits = self._compiled(*given)
        except RuntimeError as exc:  # the tracer's and the compiler's reports all are
            told = str(getattr(exc, "inner_exception", exc)).strip() or "?"
            log.warning("`--torch-compile`: the model runs uncompiled: %s", told.splitlines()[0])
            self._compiled = None
            if self.model.device.type == "cpu":
                suit_cpu(self.model.module)
            return super()._forward(token_ids, positions, last)
        CALLS["compiled:forward"] += 1
        return logits[: len(last)]

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        """`LEAST` long at least; its length is left open."""
        padded = torch.zeros(max(LEAST, len(values)), dtype=torch.int64, device=self.model.device)
        padded[: len(values)] = values
        torch._dynamo.mark_dynamic(padded, 0)
        return padded

    def _logits(self, token_ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        output = self.model.module(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=last
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits
