"""A runner whose model runs in captured pieces where a token bucket fits, and eager where none does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from disagg.cache.cache import KVCache
from disagg.engine.model.hf import capturable_experts
from disagg.engine.model.load import LoadedModel
from disagg.engine.model.opaque_attention import TRACED_ATTENTION_NAME, calling, tokens
from disagg.engine.run.graphs.decode import GraphMaker
from disagg.engine.run.graphs.use import GraphUse
from disagg.engine.run.pieces.capture import PiecewiseGraphs, capture_all, token_buckets
from disagg.engine.run.runner import Runner
from disagg.kernels.upload import upload

Int64 = npt.NDArray[np.int64]


class PiecewiseRunner(Runner):
    """`Runner` with other insides of `_forward`. Steps that want more than `max_rows` logits run eager."""

    def __init__(
        self,
        model: LoadedModel,
        cache: KVCache,
        maker: GraphMaker,
        *,
        max_num_batched_tokens: int,
        max_rows: int,
        use: GraphUse | None = None,
    ) -> None:
        super().__init__(model, cache)
        self.use = use or GraphUse()
        self.graphs = PiecewiseGraphs(maker)
        self._buckets = token_buckets(max_num_batched_tokens)
        device, longest = model.device, self._buckets[-1]
        # All that a captured piece is given from outside; it stays where it is. One token longer than any bucket:
        # Dynamo would else see that the first slice is the whole, and trace anew for a true part.
        self._token_ids = torch.zeros(longest + 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(longest + 1, dtype=torch.int64, device=device)
        self._last = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._logits = torch.zeros(max_rows, model.vocab_size, dtype=torch.float32, device=device)
        for module in model.module.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
                module.kv_pool = self._pools[int(module.layer_idx)]  # type: ignore[arg-type]
        # A part of the model that cannot be traced is an error, not a slow path.
        self._compiled = torch.compile(self._model_step, backend=self.graphs, fullgraph=True)

    @torch.inference_mode()
    def capture(self) -> None:
        """Trace the model and capture every bucket, on padding alone. Progress and memory go to the log."""
        experts = capturable_experts(self.model.module, self.model.device, self._dtype)
        # Replays do not go through Dynamo. It forgets what it learnt, else it would take numbers that differ between
        # this model and a later one for sizes to leave open.
        try:
            with tokens(0), calling(TRACED_ATTENTION_NAME, self.model.module), experts:
                capture_all(self.graphs, self._buckets, self.model.device, self._call)
        finally:
            torch._dynamo.reset()
        self.use.add(len(self.graphs.pieces) * len(self.graphs.buckets), self.graphs.maker.nbytes)

    @torch.inference_mode()
    def _forward(self, token_ids: torch.Tensor, positions: Int64, last: Int64) -> torch.Tensor:
        bucket = self.graphs.bucket(len(token_ids))
        if bucket is None or len(last) > len(self._last):
            return super()._forward(token_ids, positions, last)
        places = [upload(values, self.model.device) for values in (positions, last)]
        for static, values in zip((self._token_ids, self._positions, self._last), (token_ids, *places), strict=True):
            static[: len(values)].copy_(values)
            static[len(values) :].zero_()
        with tokens(len(token_ids)):
            self.graphs.replay(bucket)
        self.use.num_replays += 1
        return self._logits[: len(last)].clone()

    def _call(self, bucket: int) -> None:
        token_ids, positions = self._token_ids[:bucket], self._positions[:bucket]
        # One trace for all buckets: this size is open, and Dynamo refuses a model that needs to know it. Nothing else
        # is: `dynamic=True` would make inputs of a module's plain numbers, and read them back from the device.
        for tensor in (token_ids, positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        self._compiled(token_ids, positions, self._last, self._logits)

    def _model_step(
        self, token_ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, logits: torch.Tensor
    ) -> None:
        output = self.model.module(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=last
        )
        logits.copy_(output.logits[0])
