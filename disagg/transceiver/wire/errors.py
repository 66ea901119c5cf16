"""Errors of the transfer: each says whose fault it is. Foreign exceptions are translated once, at the edge."""

from __future__ import annotations

from typing import Final

MAX_TOLD_CHARS: Final = 200
"""Of one value in a sentence: three lines of a terminal. A peer may send megabytes of it, and what is told goes on into
logs, leases and answers, which have a bound of their own."""


class TransceiverError(Exception):
    """Base; never raised itself."""


class LocalProtocolError(TransceiverError):
    """This process asked for something the protocol does not allow. State is unchanged."""


class RemoteProtocolError(TransceiverError):
    """The peer sent something the protocol does not allow. State is unchanged."""


class ProtocolDiffers(RemoteProtocolError):
    """The peer speaks another major version of the protocol: nothing it says can be read, and that will not change."""

    def __init__(self, ours: str, theirs: str) -> None:
        """Both as `major.minor`."""
        super().__init__(f"peer speaks protocol {theirs}, this process {ours}")
        self.ours, self.theirs = ours, theirs


class TransferFailed(TransceiverError):
    """A transfer ended without KV that may be used; the message is its reason."""


class TransferTimeout(TransceiverError):
    """A deadline of ours passed without an answer."""


class PeerLost(TransceiverError):
    """The peer's incarnation is gone: end of file, reset, or silence."""


class PlaneRefused(TransceiverError):
    """A data plane cannot be used with this peer; the message says why and what else would work."""


class SourceChanged(TransceiverError):
    """A source slot's generation is not the planned one: its bytes may belong to another sequence."""


class TicketRefused(RemoteProtocolError):
    """A FETCH without a valid ticket for this transfer, epoch and incarnation."""


class EndpointRefused(TransceiverError):
    """This process cannot listen at, or connect to, that address; the message says why and what to do."""


class Shortage(TransceiverError):
    """This process has no descriptor, thread or memory for one more connection. It is not ready, and tried again."""


def first_cause(error: BaseException) -> BaseException:
    """The first plain exception of a (nested) group: the others followed from it."""
    return first_cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def clipped(text: str, limit: int = MAX_TOLD_CHARS) -> str:
    """`text`, or its beginning and its length."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
