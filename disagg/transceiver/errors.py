"""Errors of the transfer: each says whose fault it is. Foreign exceptions are translated once, at the edge."""

from __future__ import annotations


class TransceiverError(Exception):
    """Base; never raised itself."""


class LocalProtocolError(TransceiverError):
    """This process asked for something the protocol does not allow. State is unchanged."""


class RemoteProtocolError(TransceiverError):
    """The peer sent something the protocol does not allow. State is unchanged."""


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


def first_cause(error: BaseException) -> BaseException:
    """The first plain exception of a (nested) group: the others followed from it."""
    return first_cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
