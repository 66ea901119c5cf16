"""A byte flipped wherever a transfer's bytes lie: never a wrong answer, always an honest error or another attempt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster.hand_started import Cluster, cluster
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = pytest.mark.processes

NUM_TOKENS = 6
BLOCK_SIZE = 8
PROMPT_LEN = 61
FLAGS = (
    "--dtype",
    "float32",
    "--block-size",
    str(BLOCK_SIZE),
    "--max-model-len",
    "128",
    "--max-num-seqs",
    "4",
    "--no-enable-prefix-caching",
)

# Where one layer's K and V of a block lie in a slot: 2 heads x 8 tokens x 16 numbers x 4 bytes each.
HALF_NBYTES = 2 * BLOCK_SIZE * 16 * 4
BYTES = {
    "first byte of K": 0,
    "last byte of K": HALF_NBYTES - 1,
    "first byte of V": HALF_NBYTES,
    "last byte of V": -1,
}
PLACES = {"at the sender": "flip_source", "in the copy": "flip_copy", "at the receiver": "flip_landed"}


@dataclass(frozen=True)
class Case:
    cluster: Cluster
    reference: Reference


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    model = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    (reference,) = safe_prompts(build_family("gemma3"), [PROMPT_LEN], NUM_TOKENS)
    with cluster(model, tmp_path_factory.mktemp("faults"), *FLAGS) as made:
        made.allow_attempts(1)
        made.start_worker("prefill", "prefill-0")
        made.start_worker("prefill", "prefill-1")
        made.start_worker("decode", "decode-0", "--planes", "shm")
        made.wait_until_linked()
        yield Case(made, reference)


def ask(case: Case, request_id: str, **body: Any) -> tuple[int, Any]:
    prompt = list(case.reference.prompt)
    greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return case.cluster.system.complete(prompt, request_id=request_id, **greedy, **body)


def modes(case: Case, request_id: str) -> list[str]:
    return [attempt["mode"] for attempt in case.cluster.system.record(request_id)["attempts"]]


def check_right(case: Case, answer: tuple[int, Any]) -> None:
    status, body = answer
    assert status == 200, body
    same(tuple(body["choices"][0]["token_ids"]), case.reference.token_ids)


def test_without_faults_the_tokens_are_right(case: Case) -> None:
    case.cluster.allow_attempts(1)
    case.cluster.faults.set()
    check_right(case, ask(case, "clean"))
    assert modes(case, "clean") == ["transfer"]


@pytest.mark.parametrize("byte", BYTES)
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_byte_is_an_error_without_retry(case: Case, place: str, byte: str) -> None:
    case.cluster.allow_attempts(1)
    case.cluster.faults.set(**{PLACES[place]: {"byte": BYTES[byte], "times": 1}})
    status, body = ask(case, "once")
    assert case.cluster.faults.num_fired(PLACES[place]) == 1
    assert status == 503
    assert "digest" in body["error"]["message"], body


@pytest.mark.parametrize("group", [0, 1])
def test_a_flipped_byte_is_seen_in_every_layer_group(case: Case, group: int) -> None:
    case.cluster.allow_attempts(1)
    case.cluster.faults.set(flip_landed={"byte": 17, "times": 1, "group": group})
    status, body = ask(case, f"group-{group}")
    assert case.cluster.faults.num_fired("flip_landed") == 1
    assert (status, "digest" in body["error"]["message"]) == (503, True)


def test_a_flipped_byte_is_an_error_for_a_stream_too(case: Case) -> None:
    """Headers wait for the first token, and that waits for verification: the status is true."""
    case.cluster.allow_attempts(1)
    case.cluster.faults.set(flip_landed={"byte": 0, "times": 1})
    status, body = ask(case, "stream", stream=True)
    assert (status, "digest" in body["error"]["message"]) == (503, True)


@pytest.mark.parametrize("byte", BYTES)
@pytest.mark.parametrize("place", PLACES)
def test_with_retry_the_other_prefill_worker_gives_the_right_tokens(case: Case, place: str, byte: str) -> None:
    case.cluster.allow_attempts(3)
    case.cluster.faults.set(**{PLACES[place]: {"byte": BYTES[byte], "times": 1}})
    request_id = f"retry-{PLACES[place]}-{BYTES[byte]}"
    check_right(case, ask(case, request_id))
    assert case.cluster.faults.num_fired(PLACES[place]) == 1
    assert modes(case, request_id) == ["transfer", "retarget"]


@pytest.mark.parametrize("place", PLACES)
def test_when_every_transfer_is_corrupt_the_decode_worker_computes_the_prompt(case: Case, place: str) -> None:
    case.cluster.allow_attempts(3)
    case.cluster.faults.set(**{PLACES[place]: {"byte": 5, "times": 999}})
    check_right(case, ask(case, f"always-{PLACES[place]}"))
    assert case.cluster.faults.num_fired(PLACES[place]) >= 2
    assert modes(case, f"always-{PLACES[place]}") == ["transfer", "retarget", "local"]


def test_failed_transfers_leave_no_block_and_are_counted(case: Case) -> None:
    case.cluster.faults.set()
    system = case.cluster.system
    system.settle()
    system.wait_until_idle()
    assert system.total("disagg_transfers_total", outcome="failed") > 0
    assert system.total("disagg_digest_failures_total") > 0


def test_with_curve_a_byte_flipped_on_the_wire_ends_the_connection_and_the_request_is_retried(case: Case) -> None:
    """The last test of this cluster: its decode worker is replaced by one that fetches over zmq."""
    case.cluster.faults.set()
    case.cluster.stop_worker("decode-0")
    case.cluster.start_worker("decode", "decode-1", "--planes", "zmq")
    case.cluster.wait_until_linked()
    case.cluster.allow_attempts(3)
    check_right(case, ask(case, "sealed"))
    assert case.cluster.system.record("sealed")["transfer"]["plane"] == "zmq"
    case.cluster.faults.set(flip_wire={"byte": 700, "times": 1})
    check_right(case, ask(case, "broken-seal"))
    assert case.cluster.faults.num_fired("flip_wire") == 1
    attempts = case.cluster.system.record("broken-seal")["attempts"]
    assert [attempt["mode"] for attempt in attempts] == ["transfer", "retarget"]
    assert "lost" in attempts[0]["outcome"], attempts
    case.cluster.wait_until_linked()  # the broken connection was made anew
    check_right(case, ask(case, "sealed-again"))
    case.cluster.system.settle()
    case.cluster.system.wait_until_idle()
