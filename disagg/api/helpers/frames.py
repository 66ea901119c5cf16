"""What the API and its helper processes say to each other over two pipes: frames of a kind, a length and bytes."""

from __future__ import annotations

import struct
from array import array
from typing import Any, Final

import msgpack

from disagg.api.http.errors import ApiError
from disagg.api.request.params import RequestParams
from disagg.api.request.preparation import Prepared, chosen

HEAD: Final = struct.Struct("=cI")
JOB: Final = b"J"  # settings (first), then (endpoint, max_model_len) before each body
BODY: Final = b"B"  # the body of a request; a part of the body of an answer
PREPARED: Final = b"P"
ERROR: Final = b"E"
END: Final = b"Z"  # no further part follows


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return HEAD.pack(kind, len(payload)) + payload


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return packed


def unpack(payload: bytes) -> Any:
    return msgpack.unpackb(payload, unicode_errors="surrogatepass", use_list=False)


def pack_prepared(prepared: Prepared) -> bytes:
    return pack((chosen(prepared.params), [(array("i", ids).tobytes(), echo) for ids, echo in prepared.prompts]))


def unpack_prepared(payload: bytes) -> Prepared:
    values, prompts = unpack(payload)
    return Prepared(RequestParams(**values), [(_ids(ids), echo) for ids, echo in prompts])


def _ids(data: bytes) -> array[int]:
    ids = array("i")
    ids.frombytes(data)
    return ids


def pack_error(error: ApiError) -> bytes:
    return pack((error.status, error.message, error.param, error.code))


def unpack_error(payload: bytes) -> ApiError:
    status, message, param, code = unpack(payload)
    return ApiError(status, message, param=param, code=code)
