"""Prefill and mixed steps in pieces: attention runs eager, all that lies between two attentions is a captured graph.

Dynamo traces the model once, with the number of tokens left open; the backend here cuts what it traced at attention and
hands back the pieces. For each token bucket every piece is captured; a step is padded to its bucket and replays them.
What one piece hands to attention and to later pieces lies in one arena that serves all layers and all buckets, so that
graphs keep as much as the largest bucket needs at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch.fx.passes.split_module import split_module

from disagg.engine.run.graphs.decode import MIB, Graph, GraphMaker
from disagg.engine.run.pieces.arena import Arena, Handed, look, spans
from disagg.kernels.dispatch import CALLS

log = logging.getLogger(__name__)

# Dynamo makes a constant of a size of 0 or 1, and smaller steps than this gain nothing over the first bucket.
LEAST_BUCKET = 4


class Phase(Enum):
    EAGER = auto()  # pieces run as they were traced; nothing is kept
    LEARN = auto()  # the same, and what their outputs are is noted
    CAPTURE = auto()
    REPLAY = auto()


def token_buckets(max_num_batched_tokens: int) -> tuple[int, ...]:
    """4, 8, 16, ... and the largest step itself, whatever the number of sequences: one prompt may fill a step."""
    powers = (1 << i for i in range(max_num_batched_tokens.bit_length()))
    return (*(p for p in powers if LEAST_BUCKET <= p < max_num_batched_tokens), max_num_batched_tokens)


@dataclass(slots=True)
class Turn:
    """What the pieces of one model are told: they are called without arguments of their own."""

    phase: Phase = Phase.EAGER
    bucket: int = 0
    arena: Arena | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One piece in one bucket. `outputs`: in the arena, where the pieces and attentions behind it read them."""

    graph: Graph
    outputs: Any
    addresses: tuple[int, ...]


class Piece(torch.nn.Module):
    """What lies between two attentions; one graph per bucket."""

    def __init__(self, name: str, traced: torch.nn.Module, turn: Turn, maker: GraphMaker) -> None:
        super().__init__()
        self.name = name
        self._traced, self._turn, self._maker = traced, turn, maker
        self._blank = blank_outputs(traced)
        self.handed: tuple[Handed, ...] = ()
        self.entries: dict[int, _Entry] = {}

    def forward(self, *args: Any) -> Any:
        if self._turn.phase is Phase.EAGER:
            return self._traced(*args)
        if self._turn.phase is Phase.LEARN:
            outputs = self._traced(*args)
            self.handed = look(args, _listed(outputs), self._blank)
            return outputs
        if self._turn.phase is Phase.CAPTURE:
            return self._capture(args)
        entry = self.entries[self._turn.bucket]
        assert _addresses(args) == entry.addresses, "an input of a captured piece moved"
        entry.graph.replay()
        CALLS["graph:piece"] += 1
        return entry.outputs

    def _capture(self, args: Sequence[Any]) -> Any:
        graph = self._maker.new()
        outputs = graph.capture(lambda: self._kept(self._traced(*args)))
        self.entries[self._turn.bucket] = _Entry(graph, outputs, _addresses(args))
        return outputs

    def _kept(self, outputs: Any) -> Any:
        assert self._turn.arena is not None, "no arena was made"
        kept = self._turn.arena.keep(self.name, self.handed, _listed(outputs))
        return kept if isinstance(outputs, tuple | list) else kept[0] if kept else outputs


def _listed(outputs: Any) -> tuple[Any, ...]:
    """The outputs of a part, of which fx returns a single one as it is."""
    if isinstance(outputs, tuple | list):
        return tuple(outputs)
    return () if outputs is None else (outputs,)


def blank_outputs(traced: torch.nn.Module) -> frozenset[int]:
    """Positions of outputs that were allocated alone: what attention will write."""
    if not isinstance(traced, torch.fx.GraphModule):
        return frozenset()
    (returned,) = next(node for node in traced.graph.nodes if node.op == "output").args
    nodes = returned if isinstance(returned, tuple | list) else (returned,)
    return frozenset(i for i, x in enumerate(nodes) if isinstance(x, torch.fx.Node) and x.target == "new_empty")


def _addresses(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in args if isinstance(x, torch.Tensor))


@dataclass(slots=True)
class PiecewiseGraphs:
    """A Dynamo backend, and the graphs of what it was given.

    `trace` calls the model through `torch.compile(..., backend=this)`: eager with what was traced, which keeps nothing.
    `capture` then records one bucket; `replay` repeats it, past Dynamo and all Python of the model.
    """

    maker: GraphMaker
    turn: Turn = field(default_factory=Turn)
    pieces: list[Piece] = field(default_factory=list)
    _cut: Any = None
    _args: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    def __call__(self, traced: torch.fx.GraphModule, _example: Sequence[Any]) -> Callable[..., Any]:
        """What `torch.compile` asks of a backend."""
        assert self._cut is None, "the model was traced twice"
        self._cut, self.pieces = cut(traced, lambda name, piece: Piece(name, piece, self.turn, self.maker))
        return self._run

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(sorted(self._args))

    def bucket(self, num_tokens: int) -> int | None:
        """The smallest captured bucket with room; None: run it eager."""
        return next((bucket for bucket in self.buckets if bucket >= num_tokens), None)

    def learn(self, device: torch.device, call: Callable[[], object]) -> None:
        """Run `call`, which calls the compiled model on the largest bucket, and make the arena that all will use."""
        with self._in(Phase.LEARN, 0):
            call()
        handed = {piece.name: piece.handed for piece in self.pieces}
        self.turn.arena = Arena(spans(self._cut, handed), device)

    def capture(self, bucket: int, call: Callable[[], object]) -> None:
        """Record `call`, which runs the compiled model on `bucket` tokens."""
        with self._in(Phase.CAPTURE, bucket):
            call()

    def replay(self, bucket: int) -> None:
        """Run the pieces and the attentions between them on the tensors that they were captured with."""
        with self._in(Phase.REPLAY, bucket):
            self._cut(*self._args[bucket])
        CALLS["graph:piecewise"] += 1

    def _run(self, *args: Any) -> Any:
        if self.turn.phase is Phase.CAPTURE:
            self._args[self.turn.bucket] = args
        return self._cut(*args)

    @contextmanager
    def _in(self, phase: Phase, bucket: int) -> Iterator[None]:
        self.turn.phase, self.turn.bucket = phase, bucket
        try:
            yield
        finally:
            self.turn.phase, self.turn.bucket = Phase.EAGER, 0


def cut(
    traced: torch.fx.GraphModule, wrap: Callable[[str, torch.nn.Module], Piece]
) -> tuple[torch.fx.GraphModule, list[Piece]]:
    """`traced` as a sequence of parts, in their order: each attention alone, and what is between, wrapped."""
    part: dict[torch.fx.Node, int] = {}
    number = 0
    attentions = set()
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if is_attention(node):
            attentions.add(number + 1)
            part[node], number = number + 1, number + 2
        else:
            part[node] = number
    whole = split_module(traced, traced, lambda node: part[node], keep_original_order=True)
    pieces = []
    for name, module in list(whole.named_children()):
        if int(name.removeprefix("submod_")) not in attentions:
            pieces.append(wrap(name, module))
            setattr(whole, name, pieces[-1])
    return whole, pieces


def is_attention(node: torch.fx.Node) -> bool:
    """By identity: an operation whose name merely contains ours is none."""
    packets = (torch.ops.disagg.attend, torch.ops.disagg.attend_packed)
    return node.op == "call_function" and node.target in (*packets, *(packet.default for packet in packets))


def capture_all(
    graphs: PiecewiseGraphs, buckets: Sequence[int], device: torch.device, call: Callable[[int], object]
) -> None:
    """Trace with the largest bucket, run each once eager, then capture them, the largest first."""
    started = time.monotonic()
    for bucket in reversed(buckets):
        call(bucket)
    graphs.learn(device, lambda: call(buckets[-1]))
    for number, bucket in enumerate(reversed(buckets)):
        graphs.capture(bucket, lambda bucket=bucket: call(bucket))  # type: ignore[misc]
        log.info("captured piecewise graphs %d of %d: %d tokens", number + 1, len(buckets), bucket)
    seconds, taken = time.monotonic() - started, graphs.maker.nbytes / MIB
    log.info("%d pieces in %d buckets take %.0f MiB, %.1f s", len(graphs.pieces), len(buckets), taken, seconds)
