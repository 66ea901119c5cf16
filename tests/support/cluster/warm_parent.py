"""A process that has loaded what `disagg` processes load, and forks one whenever a test asks (see `warm.py`).

Loading torch and transformers takes seconds of CPU, a fork milliseconds. `python -P warm_parent.py FD PADDING`: the
socket on which it is asked, and words whose memory its forks write their own command line into. It has one thread and
imports nothing of `support`: a fork is as a fresh `disagg` is, but for the modules that it has.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NoReturn

REQUEST_NBYTES: Final = 1 << 18  # a command line and an environment
MAX_FDS: Final = 16  # of one request: stdin, stdout, stderr, where the end is told, and what the command line names
HIGHEST_FD: Final = 1 << 16  # more than a test's process has open
SPARE_FD: Final = 1000  # from here on: above what a command line names

PYTHON: Final = [sys.executable, "-P"]
COMMANDS: Final = {
    ("-m", name) for name in ("disagg", "disagg.api.helpers.process", "disagg.cli.api_process", "disagg.bench.child")
}
PROGRAMS: Final = {"faulty_worker.py", "describe_process.py"}  # they patch what is loaded, or nothing
READ_AT_IMPORT: Final = ("DISAGG_KERNELS", "DISAGG_FUSED_QKV", "DISAGG_NATIVE", "TRITON_INTERPRET", "LD_PRELOAD")
MODULES: Final = (
    *("disagg.cli.main", "disagg.cli.up", "disagg.api.main", "disagg.api.helpers.process", "disagg.worker.main"),
    *("uvicorn.protocols.http.h11_impl", "uvicorn.lifespan.off", "safetensors.torch"),
    *("disagg.cli.api_process", "disagg.api.processes.process", "disagg.bench.child"),
)
"""What a router, a process and a helper of the API, a worker and a side of a benchmark load, at once or later."""
CLASSES: Final = ("LlamaForCausalLM", "Gemma3ForCausalLM", "PreTrainedTokenizerFast", "AutoTokenizer")
"""What transformers loads when it is asked for."""

Popen: Final = subprocess.Popen


def can_stand_for(argv: Any, environ: Mapping[str, str]) -> bool:
    """Whether a fork does what this command does: ours, in an environment that gives the same modules."""
    if isinstance(argv, str) or list(argv[: len(PYTHON)]) != PYTHON:
        return False
    program = argv[len(PYTHON) :]
    is_ours = tuple(program[:2]) in COMMANDS or os.path.basename(program[0]) in PROGRAMS
    return is_ours and all(environ.get(name) == os.environ.get(name) for name in READ_AT_IMPORT)


# --- the life of a fork ---------------------------------------------------------------------------------------


def live(argv: Sequence[str], environ: Mapping[str, str], given: Mapping[int, int]) -> NoReturn:
    """As a process that `python -P ARGV...` started. `given`: its descriptors, stdio among them, by their number."""
    code = 1
    try:
        copies = {fd: fcntl.fcntl(source, fcntl.F_DUPFD, SPARE_FD) for fd, source in given.items()}
        for fd, copy in copies.items():  # a source may have the number of another
            os.dup2(copy, fd)
        forget(given)
        os.environ.clear()
        os.environ.update(environ)
        open_streams(environ)
        show_command([*PYTHON, *argv])
        subprocess.Popen = Forked  # type: ignore[misc]
        run(argv)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        end(code)


def forget(keep: Collection[int]) -> None:
    """What a process that was forked while it runs would share: descriptors, and what it does on signals."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    first = 3
    for fd in (*sorted(fd for fd in keep if fd >= first), HIGHEST_FD):
        os.closerange(first, fd)
        first = fd + 1


def open_streams(environ: Mapping[str, str]) -> None:
    encoding, _, errors = environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for name, fd, usual in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = open(fd, "w", encoding=encoding, errors=errors or usual, closefd=False)  # noqa: SIM115 - of the process
        setattr(sys, name, stream)


def show_command(argv: Sequence[str]) -> None:
    """Let `/proc/PID/cmdline` say `argv`: tests find processes by it."""
    with open("/proc/self/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, of proc(5)
    words = b"\0".join(word.encode() for word in argv)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, words, len(words))


def run(argv: Sequence[str]) -> None:
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


def end(code: int) -> NoReturn:
    """As the interpreter ends, but for the frames below, which belong to the process that was forked."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Forked(Popen[Any]):
    """What a fork starts: forks of it in their turn, where they can stand for the command."""

    def _execute_child(self, *values: Any) -> None:
        given = as_named(self, values)
        environ = os.environ if given["env"] is None else given["env"]
        if not can_stand_for(given["args"], environ):
            super()._execute_child(*values)  # type: ignore[misc]
            return
        environ = dict(environ)
        self.pid = os.fork()
        if self.pid == 0:
            if (group := given.get("process_group", -1)) != -1:
                os.setpgid(0, group)
            live(given["args"][len(PYTHON) :], environ, descriptors_of(given))
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPES))  # type: ignore[attr-defined]


PIPES: Final = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def as_named(popen: Popen[Any], values: Sequence[Any]) -> dict[str, Any]:
    """What `Popen` tells itself, whose order is not the same in every Python."""
    names = inspect.signature(Popen._execute_child).parameters  # type: ignore[attr-defined]
    return dict(zip(names, (popen, *values), strict=True))


def descriptors_of(given: Mapping[str, Any]) -> dict[int, int]:
    """The child's descriptors and what they are here; streams that were not asked for are its parent's."""
    ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
    stdio = {fd: fd if end == -1 else end for fd, end in enumerate(ends)}
    return stdio | {fd: fd for fd in given["pass_fds"]}


# --- the parent -----------------------------------------------------------------------------------------------


def load() -> None:
    for name in MODULES:
        importlib.import_module(name)
    from disagg.engine.model.hf import transformers

    for name in CLASSES:
        getattr(transformers, name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all that is here
    assert threading.active_count() == 1
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that forks"


def serve(control: socket.socket) -> list[int]:
    """Fork as asked, and tell each fork's end, until the test's process is gone. Returns the forks that still run."""
    watch = select.poll()
    watch.register(control, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # by descriptor of the process: its id, and where its end is told
    control.send(b"ready")
    while True:
        for fd, _ in watch.poll():
            if fd == control.fileno():
                if (started := fork(control)) is None:
                    return [pid for pid, _ in running.values()]
                pid, told = started
                process = os.pidfd_open(pid)
                running[process] = pid, told
                watch.register(process, select.POLLIN)
            else:
                pid, told = running.pop(fd)
                watch.unregister(fd)
                tell_end(pid, told)
                os.close(fd)


def fork(control: socket.socket) -> tuple[int, int] | None:
    """The new process's id and where its end is told; None when there are no more requests."""
    data, fds, _, _ = socket.recv_fds(control, REQUEST_NBYTES, MAX_FDS)
    if not data:
        return None
    asked = json.loads(data)
    *sources, told = fds
    pid = os.fork()
    if pid == 0:
        if asked["session"]:
            os.setsid()
        os.chdir(asked["cwd"])
        control.detach()
        live(asked["argv"], asked["env"], dict(zip(asked["fds"], sources, strict=True)))
    for fd in sources:
        os.close(fd)
    control.send(str(pid).encode())
    return pid, told


def tell_end(pid: int, told: int) -> None:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the test's process is gone
        os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(told)


if __name__ == "__main__":
    asking = socket.socket(fileno=int(sys.argv[1]))
    load()
    for left in serve(asking):
        os.kill(left, signal.SIGKILL)  # and with it, what it started: see disagg/cli/lifeline.py
