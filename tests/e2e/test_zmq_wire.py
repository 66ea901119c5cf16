"""The zmq plane without encryption, through a proxy that parses its frames: bytes counted there, and bytes flipped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster.hand_started import Cluster, cluster
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

pytestmark = pytest.mark.processes

NUM_TOKENS = 6
BLOCK_SIZE = 8
LENGTHS = (5, 8, 9, 23, 24, 25, 64, 97)  # around blocks and the window of 24
FLAGS = (
    "--dtype",
    "float32",
    "--block-size",
    str(BLOCK_SIZE),
    "--max-model-len",
    "128",
    "--max-num-seqs",
    "8",
    "--no-enable-prefix-caching",
)

HALF_NBYTES = 2 * BLOCK_SIZE * 16 * 4  # one layer's K, or V, of a block: 2 heads x 8 tokens x 16 float32
BYTES = {
    "first byte of K": 0,
    "last byte of K": HALF_NBYTES - 1,
    "first byte of V": HALF_NBYTES,
    "last byte of V": -1,
}


@dataclass(frozen=True)
class Case:
    cluster: Cluster
    layers: list[StoredLayer]
    references: list[Reference]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    model = build_family("gemma3")
    references = safe_prompts(model, LENGTHS, NUM_TOKENS)
    with cluster(folder, tmp_path_factory.mktemp("faults"), *FLAGS, "--planes", "zmq", "--insecure") as made:
        made.allow_attempts(1)
        made.start_worker("prefill", "prefill-0")
        made.start_worker("decode", "decode-0")
        made.wait_until_linked()
        yield Case(made, stored_layers(model, itemsize=4), references)


def ask(case: Case, reference: Reference, request_id: str) -> tuple[int, Any]:
    greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return case.cluster.system.complete(list(reference.prompt), request_id=request_id, **greedy)


def check_right(reference: Reference, answer: tuple[int, Any]) -> None:
    status, body = answer
    assert status == 200, body
    same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)


def counted_nbytes(case: Case) -> int:
    return sum(map(int, case.cluster.faults.told("wire-")))


def test_payload_on_the_wire_is_what_the_metric_says_and_the_least_possible(case: Case) -> None:
    system = case.cluster.system
    assert {link["plane"] for worker in system.workers("decode") for link in worker["links"]} == {"zmq"}
    probed = counted_nbytes(case)  # first contact measures the wire with zeros, before any request

    def ask_one(reference: Reference) -> tuple[int, Any]:
        return ask(case, reference, f"p{len(reference.prompt)}")

    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        for reference, answer in zip(case.references, pool.map(ask_one, case.references), strict=True):
            check_right(reference, answer)
    least = sum(sum(minimum_nbytes(case.layers, length, BLOCK_SIZE).values()) for length in LENGTHS)
    system.settle()
    system.wait_until_idle()
    assert counted_nbytes(case) - probed == least > 0
    assert system.total("disagg_transfer_bytes_total", plane="zmq", outcome="verified") == least
    assert system.total("disagg_transfer_bytes_total") == least


@pytest.mark.parametrize("byte", BYTES)
def test_a_byte_flipped_in_flight_is_an_error_without_retry(case: Case, byte: str) -> None:
    case.cluster.allow_attempts(1)
    case.cluster.faults.set(flip_wire={"byte": BYTES[byte], "times": 1})
    status, body = ask(case, case.references[-1], "once")
    assert case.cluster.faults.num_fired("flip_wire") == 1
    assert (status, "digest" in body["error"]["message"]) == (503, True), body


@pytest.mark.parametrize("byte", BYTES)
def test_a_byte_flipped_in_flight_gives_the_right_tokens_with_retry(case: Case, byte: str) -> None:
    case.cluster.allow_attempts(2)
    case.cluster.faults.set(flip_wire={"byte": BYTES[byte], "times": 1})
    request_id = f"retry-{BYTES[byte]}"
    check_right(case.references[-1], ask(case, case.references[-1], request_id))
    assert case.cluster.faults.num_fired("flip_wire") == 1
    attempts = case.cluster.system.record(request_id)["attempts"]
    assert [attempt["mode"] for attempt in attempts] == ["transfer", "local"]


def test_nothing_is_left_of_failed_transfers(case: Case) -> None:
    case.cluster.faults.set()
    case.cluster.system.settle()
    case.cluster.system.wait_until_idle()
    check_right(case.references[0], ask(case, case.references[0], "afterwards"))
