"""Tokens on their way to the router: one message per step while its credit lasts, fewer and longer ones without it.

What waits is merged, so that a router which falls behind gets more tokens per message. Past a bound the engine is held:
it begins no step until half of what waits has left. Leases and other attempts' messages never wait here.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from typing import Final

from disagg.transceiver.wire.errors import clipped
from disagg.transceiver.wire.messages.router import (
    Finished,
    PromptScores,
    RequestFailed,
    RouterMessage,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import StepTokens, Tokens

MAX_WAITING: Final = 1 << 15
"""Tokens that wait before the engine is held: 0.6 s of the 50,000 tokens/s that the fastest devices make, 3 MB here."""

MAX_ROWS: Final = 512
"""Attempts in one message: the router takes them in one go, in 10 us each, and one handler has 5 ms."""

MAX_NUMBERS: Final = 1 << 15
"""Token ids and log-probabilities in one message: 8 bytes each make a quarter of the bytes that it may have."""


class TokenOutbox:
    """Of one registration, on its event loop. `send` takes messages in order; `on_hold` hears when the bound is met."""

    def __init__(self, send: Callable[[RouterMessage], None], on_hold: Callable[[bool], None]) -> None:
        self._send, self._on_hold = send, on_hold
        self._waiting: dict[str, deque[Tokens | RouterMessage]] = {}
        """By transfer id: one attempt of a request speaks at a time, and may change its epoch meanwhile."""
        self._limit = self._num_sent = 0
        self._is_held = self._is_due = False
        self.num_waiting = 0
        """Tokens."""

    def add(self, tokens: Tokens) -> bool:
        """Let `tokens` wait for the end of this turn. True when a `flush` is to be called then and was not yet."""
        if (fault := _fault_in(tokens)) is not None:
            if (word := shorter(tokens, fault)) is not None and not self.follow(word):
                self._send(word)
            return False
        self._waiting.setdefault(tokens.transfer_id, deque()).append(tokens)
        self.num_waiting += len(tokens.token_ids)
        self._hold()
        is_first, self._is_due = not self._is_due, True
        return is_first

    def follow(self, message: RouterMessage) -> bool:
        """Let `message` wait behind the tokens of its attempt. False when there are none."""
        if not self._waiting:
            return False
        if (said := self._waiting.get(getattr(message, "transfer_id", ""))) is None:
            return False
        said.append(message)
        return True

    def allow(self, limit: int) -> None:
        """The router takes `limit` messages in all."""
        self._limit = max(self._limit, limit)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the credit goes."""
        self._is_due = False
        while self._waiting and self._num_sent < self._limit:
            tokens, others = self._take_some()
            if tokens:
                self._num_sent += 1
                self._send(StepTokens.of(tokens))
            for message in others:
                self._send(message)
        self._hold()

    def close(self) -> None:
        """The registration is over: what waits has no reader, and the engine is held no longer."""
        self._waiting.clear()
        self.num_waiting = 0
        self._hold()

    def _take_some(self) -> tuple[list[Tokens], list[RouterMessage]]:
        """Tokens for one message, and what followed them. Attempts come in the order in which they began to wait."""
        tokens, others = list[Tokens](), list[RouterMessage]()
        room = MAX_NUMBERS
        while self._waiting and len(tokens) < MAX_ROWS and room > 0:
            key, said = next(iter(self._waiting.items()))
            while said and len(tokens) < MAX_ROWS and room > 0:
                match said.popleft():
                    case Tokens() as some:
                        tokens.append(some)
                        room -= _num_numbers(some)
                        self.num_waiting -= len(some.token_ids)
                    case message:
                        others.append(message)
            if not said:
                del self._waiting[key]
        return tokens, others

    def _hold(self) -> None:
        must_hold = self.num_waiting > (MAX_WAITING // 2 if self._is_held else MAX_WAITING)
        if must_hold != self._is_held:
            self._is_held = must_hold
            self._on_hold(must_hold)


def _num_numbers(tokens: Tokens) -> int:
    return len(tokens.token_ids) + sum(2 * len(found.top) + 2 for found in tokens.logprobs)


def _fault_in(tokens: Tokens) -> str | None:
    """Why no array can hold these; one attempt's must not cost the others of its step."""
    try:
        numbers = array("i", (*tokens.token_ids, tokens.epoch, tokens.index, tokens.num_cached_tokens))
        numbers.extend(token_id for found in tokens.logprobs for token_id, _ in found.top)
        if tokens.logprobs or min(numbers) < 0:
            StepTokens.of([tokens])
    except (TypeError, OverflowError, ValueError) as exc:
        return str(exc)
    return None


def shorter(message: RouterMessage | Tokens, fault: str) -> TransferFailure | RequestFailed | None:
    """What stands for a message that cannot be sent; None for one that decides no attempt."""
    why = f"this worker cannot say what became of it: {fault}"
    match message:
        case TransferFailure(
            transfer_id=transfer_id, epoch=epoch, reason=reason
        ):  # the router may try again, as it would have
            return TransferFailure(transfer_id, epoch, f"{_plain(reason)}; {why}")
        case RequestFailed(transfer_id=transfer_id, epoch=epoch, status=status, message=said):
            return RequestFailed(transfer_id, epoch, status, f"{_plain(said)}; {why}")
        case (
            Tokens(transfer_id=transfer_id, epoch=epoch)
            | Finished(transfer_id=transfer_id, epoch=epoch)
            | PromptScores(transfer_id=transfer_id, epoch=epoch)
        ):
            return RequestFailed(transfer_id, epoch, 500, why)
        case _:
            return None


def _plain(text: str) -> str:
    """Without what UTF-8 cannot encode, which may be why a text was not sent."""
    return clipped(text).encode(errors="replace").decode()
