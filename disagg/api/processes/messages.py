"""What the router process and an API process say to each other: `[tag, {field: value}]` by the wire's shapes.

The two are of one version and one trust, so there is no negotiation; shapes are checked all the same. Prompts and
tokens cross as bytes. `number` names an answer or a question; the API process draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgpack

from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.ranges import MAX_ITEMS
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs
from disagg.transceiver.wire.schema import PackedInts, Record

MAX_FRAME_NBYTES: Final = 64 << 20
"""Of one message: twice the ids of the largest body (8 MiB of JSON), or `/metrics` of some thousand workers."""


# --- API process to router --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAnswer:
    """Generate an answer; see `GenerationRequest`. `credit`: chunks that may be sent before more is granted.

    `prompt`: the bytes of an array of int32 of this machine; the router's process looks at no id of it.
    """

    number: int
    request_id: str
    prompt: bytes
    sampling: Sampling
    credit: int
    priority: int = 0
    tenant: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class StopAnswer:
    """The client left, or needs no more."""

    number: int


@dataclass(frozen=True, slots=True)
class StopChoice:
    """The client needs no more of one choice; the others go on."""

    number: int
    choice: int


@dataclass(frozen=True, slots=True)
class AnswerCredit:
    """So many more chunks may be sent: the client took as many."""

    number: int
    count: int


@dataclass(frozen=True, slots=True)
class CoreQuestion:
    """`what`: `workers` or `metrics`."""

    number: int
    what: str


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """The process accepts clients."""


@dataclass(frozen=True, slots=True)
class ProcessVitals:
    """About once a second. `lag_buckets`: (upper edge, wakes that were late by no more) of its event loop."""

    lag_buckets: Annotated[tuple[tuple[str, int], ...], MAX_ITEMS]
    lag_sum_s: float
    num_connections: int
    cpu_s: float


# --- router to API process --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """The first message. `api_keys`: (key, tenant). Not on a command line, which every user of the machine can read."""

    model_folder: str
    served_model_name: str
    api_keys: Annotated[tuple[tuple[str, str], ...], MAX_ITEMS]


@dataclass(frozen=True, slots=True)
class CoreState:
    """What the router would say now; sent when it changes."""

    is_ready: bool
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """See `TokenChunk`."""

    number: int
    index: int
    token_ids: PackedInts
    logprobs: Annotated[tuple[TokenLogprobs, ...], MAX_ITEMS] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: Annotated[tuple[PromptLogprobs, ...], MAX_ITEMS] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """See `GenerationEnd`. Nothing of this choice follows."""

    number: int
    reason: str
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True)
class AnswerError:
    """See `GenerationError`. Nothing of this answer follows."""

    number: int
    status: int
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class CoreReply:
    """The answer to a question: JSON of the workers, or the text of the metrics."""

    number: int
    content: bytes


@dataclass(frozen=True, slots=True)
class ProcessStop:
    """Accept no more clients, let running answers end, and exit."""


_SHAPES: Final = tuple(
    Record(kind)
    for kind in (
        *(StartAnswer, StopAnswer, StopChoice, AnswerCredit, CoreQuestion, ProcessReady, ProcessVitals),
        *(ProcessSettings, CoreState, AnswerChunk, AnswerEnd, AnswerError, CoreReply, ProcessStop),
    )
)
_TAG_OF: Final = {shape.kind: tag for tag, shape in enumerate(_SHAPES)}


def pack_message(message: Any) -> bytes:
    """Raises ShapeError for a value of another type than its field says."""
    tag = _TAG_OF[type(message)]
    packed: bytes = msgpack.packb((tag, _SHAPES[tag].write(message, "")), unicode_errors="surrogatepass")
    return packed


def unpack_message(data: bytes) -> Any:
    """Raises ValueError for bytes that are no message."""
    try:
        tag, fields = msgpack.unpackb(data, unicode_errors="surrogatepass")
        shape = _SHAPES[tag]
    except (TypeError, LookupError, msgpack.UnpackException) as exc:
        raise ValueError(f"no message of an API process: {exc!r}") from exc
    return shape.read(fields, "")
