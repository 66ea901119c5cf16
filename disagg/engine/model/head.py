"""A causal model's head, from the layers' last output to logits, applied to some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits [len(rows), vocab_size] of these rows (int64) of the batch, in the model's own dtype."""


@contextmanager
def layers_kept(module: Any) -> Iterator[Head]:
    """Inside, the output of the layers of one forward pass is kept, and what is yielded applies the head to it.

    The head is the model's own code, soft caps and scales included: it is called with layers that only give back what
    was kept.
    """
    layers, kept = module.base_model, list[Any]()
    own = {name: value for name, value in vars(layers).items() if name == "forward"}
    hook = layers.register_forward_hook(lambda _module, _given, output: kept.append(output))

    def head(rows: torch.Tensor) -> torch.Tensor:
        output, forward = kept[0], layers.forward
        layers.forward = lambda *_args, **_kwargs: output
        try:
            ids = rows.new_zeros(1, output.last_hidden_state.shape[1])  # only their number is looked at
            logits: torch.Tensor = module(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0]
            return logits
        finally:
            layers.forward = forward

    try:
        yield head
    finally:
        hook.remove()
        vars(layers).pop("forward", None)
        vars(layers).update(own)
