"""Writes docs/faults.md from the table: `.venv/bin/python -m support.faults.docs`, run in `tests`."""

from __future__ import annotations

import sys

from support.faults.table import FAULTS, HALTED_BY, IMPOSSIBLE, ROWS, allowed

HEAD = """# What happens on a fault

Written from `tests/support/faults/table.py` by
`cd tests && ../.venv/bin/python -m support.faults.docs > ../docs/faults.md`: edit the table. `make faults` lets each of
these faults happen in each state of a transfer and fails on a cell that is empty.

## What you can rely on

- **Never a wrong 200.** A request decodes only from KV whose every block, hashed where it landed, is what the prefill
  worker hashed, under one seal with the request, the attempt, both processes and the first token.
- **An answer or an error within 5 s of the fault.** Before the first token the router tries again, `--max-attempts`
  times in all: another prefill worker if one is linked, else the decode worker computes the prompt itself. After the
  first token the answer goes on at another decode worker with the tokens that its client has, `--max-continuations`
  times in all. Where there is none, or with `--no-continue`, a stream ends with an error event and without `[DONE]`,
  and any other request gets 502.
- **Nothing is left behind.** Blocks of both sides are free again, and each survivor serves the next request as it
  is. A worker or router that is started again at the same address is found by itself.

## What ends what

{endings}

"At once" is for processes: the kernel closes their connections when they die. Machines and networks that vanish without
a word take the 3 s.

## Known residual risks

- A block is hashed once, when it is final. What changes it *before* that, such as a faulty memory while it is computed,
  is hashed as it is. Non-finite values are found and end the request.
- Digests protect what moves, not what a worker reads from its own pool. A block that changes at the prefill worker
  after it was hashed cannot be decoded elsewhere, but while later chunks of the prompt are still being computed there
  they, and the first token, are computed from the changed block, hashed and sealed as they are. A prefix found in the
  cache is hashed again before it is used, each block once per `--prefix-recheck-s` (60): until then a changed block can
  be built upon. On an accelerator, whose memory is not hashed in place, it is not looked at again.
- Without CURVE (`--insecure`, loopback only) damage in flight on `zmq` is found by checksums and digests, not by a key:
  they detect accidents. A damaged head of a data message ends its connection at once, a damaged payload its attempt.
- A holder of the cluster's secret can speak as any worker: it can end others' transfers by taking their name, and seal
  what it likes. What it says cannot crash a process or make it write outside the blocks it reserved for that transfer:
  a process's pools are written by itself only, and every number from a peer is checked against its own tables.
"""

ENDINGS = (
    (
        "prefill worker dies",
        "decode worker, at once by the end of a connection, else after 3 s of silence",
        "next attempt",
    ),
    (
        "decode worker dies",
        "router and prefill worker, at most one heartbeat (0.5 s) later, else after 3 s of silence",
        "next attempt on another decode worker, with what the client has; 503 without one, 502 after a token",
    ),
    (
        "router dies",
        "workers, at once or after 3 s of silence",
        "all its requests end; workers free their blocks and register anew",
    ),
    (
        "a process is replaced at its address",
        "its peers, by its incarnation: a random id that every message names",
        "what was meant for the dead one is refused and changes nothing",
    ),
    (
        "a link is cut",
        "both ends",
        "the transfer fails, the link is made again after 1 s; next attempt",
    ),
    (
        "a link falls silent",
        "both ends, after 3 s",
        "the same",
    ),
    (
        "a message is lost, late, doubled, out of order or damaged",
        "no one needs to",
        "it is repeated after 0.2 s, doubling to 2 s, until answered",
    ),
    (
        "a block changes at the sender, in flight, or where it landed",
        "decode worker, by the digest",
        "next attempt; the block is reported, counted (`disagg_digest_failures_total`) and logged",
    ),
    (
        "either end of a move, or the link between them, dies",
        "the other end and the router, as above",
        "the end that has the answer goes on with it: the router closes the sink's epoch before it resumes the source; "
        "when the one that had it is dead, as for a decode worker",
    ),
    (
        "the client goes away",
        "router",
        "both sides are cancelled",
    ),
    (
        "the request's time is over (`--request-timeout-s`)",
        "router and both workers, each by its own clock",
        "504",
    ),
)
"""(fault, noticed by and when, what follows)"""

PROCESSES = """## kill -9

Above, a trio of real workers and a router share one process, so that a test can hold each of their messages. The same
states are reached between real processes too (`tests/faults/test_real_kills.py`): in every one of them the prefill
worker, the decode worker and the router each get SIGKILL, and no process but the killed one starts anew. With a prefill
worker the request loses an attempt at most, with the decode worker it ends with 503, with the router its connection
ends; the process that takes the dead one's place serves the next request.
"""

TABLE_HEAD = """## Every state, every fault

What a client gets with one prefill and one decode worker over shared memory. **a1** is the answer by the first attempt,
**a2** by the second (the decode worker computed the prompt), **a3** by a third; **503** and **504** are errors with
that status; **gone** means that the client itself had left. A dash: the fault cannot happen there, for the reason
below.
"""


def render() -> str:
    """The whole markdown file."""
    parts = [HEAD.replace("{endings}", _endings()), _faults(), _states(), TABLE_HEAD, _table(), _reasons(), PROCESSES]
    return "\n".join(parts)


def _endings() -> str:
    lines = ["| fault | noticed by, and when | what follows |", "|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(ending) + " |" for ending in ENDINGS)])


def _faults() -> str:
    lines = ["## The faults", "", "| fault | what happens |", "|---|---|"]
    lines += [f"| {fault.name} | {fault.means} |" for fault in FAULTS]
    return "\n".join([*lines, ""])


def _states() -> str:
    lines = [
        "## The states",
        "",
        "[How they follow each other](transfer-states.md). A test stops a transfer in each:",
        "",
    ]
    lines += ["| role, state | how it is stopped there |", "|---|---|"]
    lines += [f"| {role.value}, {state.value} | {HALTED_BY[role, state]} |" for role, state in ROWS]
    return "\n".join([*lines, ""])


def _table() -> str:
    lines = ["| fault | " + " | ".join(f"{role.value[0]}: {state.value}" for role, state in ROWS) + " |"]
    lines.append("|---" * (len(ROWS) + 1) + "|")
    for fault in FAULTS:
        texts = [
            "-" if (row, fault) in IMPOSSIBLE else " ".join(sorted(allowed(row, fault, sends_bytes=False)))
            for row in ROWS
        ]
        lines.append(f"| {fault.name} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", "s: sender (prefill worker), r: receiver (decode worker).", ""])


def _reasons() -> str:
    lines = [
        f"- {fault.name}, {role.value} {state.value}: {reason}."
        for ((role, state), fault), reason in IMPOSSIBLE.items()
    ]
    return "\n".join(["Cells that no fault can fill:", "", *lines, ""])


if __name__ == "__main__":
    sys.stdout.write(render())
