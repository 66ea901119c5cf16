"""Links between workers: bytes that wait for each other, in each direction of each worker."""

from __future__ import annotations


class WorkerLink:
    """One worker's. What is sent goes in turn; what is received too. `sent`, `received`: bytes."""

    __slots__ = ("in_free_at", "out_free_at", "received", "sent")

    def __init__(self) -> None:
        self.in_free_at = self.out_free_at = 0.0
        self.sent = self.received = 0


class Network:
    """Every worker has a link of `bytes_per_s` each way; a transfer is known at its sink `latency_s` after its end."""

    def __init__(self, num_workers: int, bytes_per_s: float, latency_s: float) -> None:
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self.links = tuple(WorkerLink() for _ in range(num_workers))

    def seconds(self, nbytes: int) -> float:
        """For so many bytes with both links free."""
        return nbytes / self._bytes_per_s + self._latency_s

    def send(self, source: int, sink: int, nbytes: int, *, tail: int, begun_at: float, ready_at: float) -> float:
        """When all of it has arrived. It could flow from `begun_at` on, but for the last `tail` bytes, which exist from
        `ready_at` on: so what was computed before the last chunk moves while that is computed.
        """
        out, into = self.links[source], self.links[sink]
        start = max(begun_at, out.out_free_at, into.in_free_at)
        free_at = start + nbytes / self._bytes_per_s
        out.out_free_at = into.in_free_at = free_at
        out.sent += nbytes
        into.received += nbytes
        return max(free_at, ready_at + tail / self._bytes_per_s) + self._latency_s
