"""What the HTTP layer is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from disagg.engine.model.checkpoint import GenerationDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """`model_folder` is where tokenizer, template and config lie; `served_model_name` is the `model` that clients name.

    `api_keys`: the tenants by their bearer keys, which every route but `/health`, `/ready`, `/version` and `/metrics`
    asks for; none = open.
    `max_body_nbytes`: 8 MiB hold a million token ids, and parse in a tenth of a second.
    `max_choices`: prompts times `n` of one request; one request must not fill a queue alone.
    `send_timeout_s`: a client that reads nothing for so long is gone; its answer is cancelled.
    """

    model_folder: Path
    served_model_name: str
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_body_nbytes: int = 8 * 1024 * 1024
    max_choices: int = 128
    send_timeout_s: float = 60.0
