"""What the HTTP layer asks of the router: token ids in, token ids out. Text and JSON stay above, workers below."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """Answers to generate to one prompt: `sampling.num_choices`, numbered from 0. They begin, move and fail together.

    `request_id` is the client's X-Request-Id or one the HTTP layer drew.

    `prompt`: a tuple, or better an array of int32, which is looked at nowhere on its way to the workers.
    `priority`: lower ones are served first, here and by the workers. `tenant`: the name of the client's API key, ""
    where there are no keys; the order between tenants is fair. `timeout_s`: the client's own limit; None = the
    router's.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    priority: int = 0
    tenant: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens in order, never twice, never with a gap. `logprobs` has one entry per token, or none if not asked for.

    With the first token come `num_cached_tokens`, tokens of the prompt that were found in a cache and not computed, and
    the prompt's own log-probabilities in order of position, where they were asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The last item of every complete answer. `reason` is `stop` or `length`. It repeats `num_cached_tokens`."""

    reason: str
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    choice: int = 0


class GenerationError(Exception):
    """The request cannot be answered: `status` is the true HTTP status, whether or not a token was already sent."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class Backend(Protocol):
    """The router as the HTTP layer sees it. `workers` and `metrics` may be called on any thread, all else on the loop.

    What is awaitable is so where the router is another process.
    """

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk | GenerationEnd]:
        """Yield chunks, and for each choice a `GenerationEnd`. Raises `GenerationError`. Closing it cancels all."""

    def end_choice(self, request: GenerationRequest, choice: int) -> None:
        """The client wants no more of one choice of a request being generated; the others go on."""

    def is_ready(self) -> bool:
        """Whether a request could be placed now."""

    def max_model_len(self) -> int | None:
        """Prompt plus answer limit of the registered workers; None while none is registered."""

    def workers(self) -> list[dict[str, Any]] | Awaitable[list[dict[str, Any]]]:
        """One JSON object per registered worker, for `GET /workers`."""

    def metrics(self) -> bytes | Awaitable[bytes]:
        """Prometheus text of the router and of every worker, labelled."""


class AdminBackend(Backend, Protocol):
    """What administration asks beside that: its listener is the router process's own."""

    def record(self, request_id: str) -> Mapping[str, Any] | None:
        """The record of one request, live or recent, for `GET /requests/{id}`."""

    def drain(self, worker_id: str, draining: bool = True) -> bool:
        """Empty a worker, or give it requests again. False when it is not registered. On the router's own loop."""
