"""A model on a CPU with fewer and larger steps: one packed projection to attention, one for gates and what they gate,
norms and activations in the compiled helper, and packed weights.

As with fused QKV, a module is replaced when its structure says what it does *and* the replacement makes the same
numbers as the module's own forward. All else keeps transformers' forward.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from disagg.engine.model.decode_loop import suit_loop
from disagg.engine.model.decoder_layer import owner, suit_decoder
from disagg.engine.model.fused_qkv import FusedAttention, fuse
from disagg.engine.model.gated_layer import gated_layers, suit_gated
from disagg.engine.model.native_norm import suit_norm
from disagg.engine.model.packed_linear import pack_linears
from disagg.engine.model.probe import probe
from disagg.kernels import native_layers
from disagg.kernels.dispatch import backend, may_fuse_qkv

log = logging.getLogger(__name__)


def suit_cpu(model: nn.Module) -> None:
    """Replace what can be replaced, for inference in eager steps. Each layer keeps one copy of its weights."""
    is_served = native_layers.is_loaded() and backend(torch.device("cpu")).NAME == "torch"
    if is_served and model_dtype(model) == torch.float32:
        if may_fuse_qkv() and not _fused(model):
            fuse(model, probe(model, "cpu"))
        gates, norms = sum(map(suit_gated, gated_layers(model))), sum(map(suit_norm, list(model.modules())))
        log.info("in the compiled helper: %d norms and %d gated layers", norms, gates)
    attentions = _fused(model)
    for attention in attentions:
        attention.pack()
    log.info("packed the weights of %d linear layers", len(attentions) + pack_linears(model))
    if is_served and (count := sum(map(suit_decoder, list(model.modules())))):
        way = "a loop of our own" if suit_loop(model) else "transformers' forward"
        log.info("decode steps of %d layers are one call each, in %s", count, way)


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _fused(model: nn.Module) -> list[FusedAttention]:
    found = (owner(module, FusedAttention) for module in model.modules())
    return [attention for attention in found if attention is not None]
