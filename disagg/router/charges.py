"""Which worker deaths a request is charged with, and how one that was charged is kept from the others. Pure.

A death is charged to the requests that were new in the step that ran (fewer than 8 tokens emitted there). Two charges
end a request, so a poisonous one costs two steps and walks no further. The others of such a step are charged too, once:
until it has emitted 8 tokens a charged request has each worker to itself among the charged, so that a second death
tells which of them it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from disagg.router.choose import Placement
from disagg.router.registry import PROOF_S

MAX_CHARGES: Final = 2
"""One death may be a coincidence, a third worker is too many."""


class WorkerNews(Protocol):
    """What is known of workers beside their registration."""

    def is_in_step(self, incarnation: str, transfer_id: str) -> bool:
        """Whether this request was new in the step that the worker last began."""

    def sign_at(self, incarnation: str) -> float | None:
        """Its last sign of life; None once it is lost."""

    def taken(self, transfer_id: str) -> frozenset[str]:
        """Workers that serve another charged request, which has not emitted its tokens yet."""


class NothingKnown:
    """Where no worker tells its steps."""

    def is_in_step(self, incarnation: str, transfer_id: str) -> bool:
        return False

    def sign_at(self, incarnation: str) -> float | None:
        return None

    def taken(self, transfer_id: str) -> frozenset[str]:
        return frozenset()


class Charges:
    """Of one request. `workers`: names of the workers whose death it is charged with."""

    def __init__(self, transfer_id: str, news: WorkerNews) -> None:
        self.workers: list[str] = []
        self._transfer_id, self._news = transfer_id, news
        self._failed_at: float | None = None

    @property
    def is_spent(self) -> bool:
        return len(self.workers) >= MAX_CHARGES

    def refusal(self) -> str:
        names = " and ".join(f"`{name}`" for name in self.workers)
        return (
            f"workers {names} ended while they computed this request, so it is not tried again; "
            "their logs say why, and other requests go on"
        )

    @property
    def taken(self) -> frozenset[str]:
        """Where this request must not go now: only a charged one keeps its distance."""
        return self._news.taken(self._transfer_id) if self.workers else frozenset()

    def must_wait(self, parties: Iterable[str], now: float) -> bool:
        """Whether an attempt that failed may have ended one of its workers: until that is known nothing is tried.

        `parties`: its workers, without the one that reported the failure. A worker that was computing this request
        is either lost, which charges it, or gives a sign of life after the failure.
        """
        if self._failed_at is None:
            self._failed_at = now
        if any(self._is_in_doubt(incarnation, self._failed_at) for incarnation in parties):
            return True
        self._failed_at = None
        return False

    def _is_in_doubt(self, incarnation: str, failed_at: float) -> bool:
        sign_at = self._news.sign_at(incarnation)
        if sign_at is None or not self._news.is_in_step(incarnation, self._transfer_id):
            return False
        return sign_at < failed_at + PROOF_S


def incarnations(placement: Placement) -> tuple[str, ...]:
    """The workers of an attempt."""
    prefill = placement.prefill
    return (placement.server.incarnation, *((prefill.incarnation,) if prefill else ()))
