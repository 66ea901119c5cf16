"""A helper process of the API: reads large bodies, one at a time, until its parent closes the pipe.

A JSON parser holds the interpreter's lock for as long as a body is large, so that a thread would stop the event loop
all the same. `python -m disagg.api.helpers.process` speaks frames over stdin and stdout.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import BinaryIO, Final

from disagg.api.helpers.frames import BODY, END, ERROR, HEAD, PREPARED, frame, pack_error, pack_prepared, unpack
from disagg.api.http.errors import ApiError
from disagg.api.request.fields import GENERATE
from disagg.api.request.preparation import Preparer
from disagg.api.settings import ApiSettings
from disagg.api.text.tokenizer import ModelTokenizer

JOB_TIMEOUT_S: Final = 60  # ten times what 8 MiB of text take; a text that a tokenizer cannot cope with ends here

log: Final = logging.getLogger(__name__)


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Answer jobs until there are no more."""
    folder, name, max_choices = unpack(_read(jobs))
    settings = ApiSettings(model_folder=Path(folder), served_model_name=name, max_choices=max_choices)
    preparer = Preparer(settings, ModelTokenizer.load(settings.model_folder))
    while head := _read(jobs):
        endpoint, max_model_len = unpack(head)
        body = _read(jobs)
        signal.alarm(JOB_TIMEOUT_S)  # its default action ends this process, whatever it is doing
        for part in _answer(preparer, endpoint, body, max_model_len):
            answers.write(part)
        signal.alarm(0)
        answers.flush()


def _answer(preparer: Preparer, endpoint: str, body: bytes, max_model_len: int | None) -> list[bytes]:
    try:
        if endpoint in GENERATE:
            return [frame(PREPARED, pack_prepared(preparer.generation(endpoint, body, max_model_len)))]
        return [*(frame(BODY, part) for part in preparer.text(endpoint, body, max_model_len)), frame(END)]
    except ApiError as error:
        return [frame(ERROR, pack_error(error))]
    except Exception:
        log.exception("a helper failed on a body of %d bytes", len(body))
        return [frame(ERROR, pack_error(ApiError(500, "the server failed to read the request; its log says why")))]


def _read(jobs: BinaryIO) -> bytes:
    """The next frame's payload; nothing when the parent is gone."""
    head = jobs.read(HEAD.size)
    return jobs.read(HEAD.unpack(head)[1]) if len(head) == HEAD.size else b""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # sent to a whole group at times; the parent decides
        signal.signal(number, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
