"""What the engine is asked for where this worker computes the prompt and gives its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from disagg.engine.commands import AttemptKey, Serve
from disagg.transceiver.wire.messages.router import Dispatch


def serves_of(dispatch: Dispatch, *, urgent: bool, arrived_at: float) -> Iterator[Serve]:
    """The attempt as one command, or where several answers go on, one for each."""
    key, sampling = AttemptKey(dispatch.transfer_id, dispatch.epoch), dispatch.sampling
    if not dispatch.output:
        yield Serve(key, dispatch.prompt, sampling, urgent, dispatch.priority, arrived_at=arrived_at)
    for answer in dispatch.output:
        alone = replace(sampling.of_choice(answer.choice), num_choices=1)
        own = replace(key, choice=answer.choice)
        yield Serve(own, dispatch.prompt, alone, True, dispatch.priority, answer.token_ids, arrived_at=arrived_at)
