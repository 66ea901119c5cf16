"""Who may register, and who is paired with whom: processes started by hand, one of them wrong each time."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster.three_processes import SECRET, SERVES, Part, Trio, running_trio
from support.model.families import save_family

from disagg.transceiver.wire.codec import PROTOCOL

pytestmark = pytest.mark.processes

ODD_WORKER = str(Path(__file__).parents[1] / "support" / "cluster" / "odd_worker.py")
FLAGS = ("--dtype", "float32", "--block-size", "8", "--max-model-len", "128", "--kv-cache-memory", "4MiB")
LATER_WORKER = str(Path(__file__).parents[1] / "support" / "cluster" / "later_worker.py")
STILL_ASKING = re.compile("no answer from the router yet, still asking")


@dataclass(frozen=True)
class Cluster:
    """One good prefill worker, one decode worker that cuts its cache otherwise, and four that may not come in."""

    trio: Trio
    prefill: Part
    other_block_size: Part
    other_weights: Part
    other_length: Part
    other_secret: Part
    other_major: Part


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = save_family("llama", tmp_path_factory.mktemp("llama"))
    same_shapes = save_family("llama", tmp_path_factory.mktemp("other"), seed=2)
    with running_trio(model) as trio:
        prefill = trio.start("prefill", "prefill-a", *FLAGS)
        other_block_size = trio.start("decode", "decode-of-12", *FLAGS, program=(ODD_WORKER,))
        prefill.wait_for(SERVES)  # the first worker: later ones are compared with it
        yield Cluster(
            trio,
            prefill,
            other_block_size,
            trio.start("decode", "other-weights", *FLAGS, "--model", str(same_shapes)),
            trio.start("decode", "other-length", *FLAGS, "--max-model-len", "96"),
            trio.start("decode", "other-secret", *FLAGS, env={"DISAGG_SECRET": "the secret of somebody else"}),
            trio.start("decode", "other-major", *FLAGS, program=(LATER_WORKER,)),
        )


def registered(cluster: Cluster) -> set[str]:
    return {worker["id"] for worker in cluster.trio.api.workers()}


def assert_refused(worker: Part, field: str, *values: str, next_step: str) -> None:
    """It ends with exit code 2 and one sentence that names the field, both values and what to do."""
    assert worker.wait_for_end() == 2, worker.text
    assert len(worker.sentences) == 1, worker.text
    assert f"the router refuses this worker: {field}" in worker.sentences[0]
    missing = [value for value in values if value not in worker.sentences[0]]
    assert not missing, f"{missing} not in: {worker.sentences[0]}"
    assert worker.sentences[0].endswith(f"; {next_step}")
    assert "Traceback" not in worker.text


def test_a_worker_with_other_weights_is_refused(cluster: Cluster) -> None:
    (ours,) = {worker["identity"]["model_fingerprint"] for worker in cluster.trio.api.workers()}
    step = "give router and workers the same checkpoint, and `--verify-weights` to all or to none"
    assert_refused(cluster.other_weights, "model_fingerprint", ours, next_step=step)
    assert "other-weights" not in registered(cluster)
    assert any("refused worker `other-weights`: model_fingerprint" in line for line in cluster.trio.router.log)


def test_a_worker_with_another_length_is_refused(cluster: Cluster) -> None:
    step = "give all workers the same `--max-model-len`"
    assert_refused(cluster.other_length, "max_model_len", "128", "96", next_step=step)
    assert "other-length" not in registered(cluster)


def test_a_worker_of_another_protocol_major_is_refused(cluster: Cluster) -> None:
    versions = f"{PROTOCOL[0]}.{PROTOCOL[1]}", f"{PROTOCOL[0] + 1}.0"
    assert_refused(
        cluster.other_major, "protocol", *versions, next_step="install the same version of disagg everywhere"
    )
    assert "other-major" not in registered(cluster)
    assert any(f"peer speaks protocol {PROTOCOL[0] + 1}.0" in line for line in cluster.trio.router.log)


def test_a_worker_with_another_secret_never_registers(cluster: Cluster) -> None:
    cluster.other_secret.wait_for(STILL_ASKING)
    assert "other-secret" not in registered(cluster)
    assert not any("other-secret" in line for line in cluster.trio.router.log)
    cluster.other_secret.stop()  # it still asks: a router with its secret may come


def test_a_pair_of_other_geometry_is_never_scheduled_and_says_why(cluster: Cluster) -> None:
    cluster.other_block_size.wait_for(SERVES)
    api = cluster.trio.api
    assert registered(cluster) == {"prefill-a", "decode-of-12"}
    (prefill,), (decode,) = api.workers("prefill"), api.workers("decode")
    difference = {"field": "block_size", "prefill": "8", "decode": "12"}
    assert prefill["incompatible"] == [difference | {"worker": "decode-of-12"}]
    assert decode["incompatible"] == [difference | {"worker": "prefill-a"}]
    assert decode["links"] == []
    status, answer = api.complete([5, 6, 7], max_tokens=4, request_id="unpaired")
    assert status == 503
    for words in ("prefill-a", "decode-of-12", "block_size", "8", "12"):
        assert words in answer["error"]["message"]
    assert api.record("unpaired")["attempts"] == []
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(api.url + "/ready", timeout=10)
    with caught.value as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1


def test_a_worker_of_the_same_geometry_completes_the_pair(cluster: Cluster, tmp_path: Path) -> None:
    """The control of the test above: the block size alone kept the other one out, and still does."""
    secret_file = tmp_path / "secret"
    secret_file.write_text(SECRET + "\n")
    secret_file.chmod(0o600)
    flags = (*FLAGS, "--secret-file", str(secret_file))
    decode = cluster.trio.start("decode", "decode-of-8", *flags, env={"DISAGG_SECRET": "the file comes before this"})
    decode.wait_for(SERVES)
    api = cluster.trio.api
    api.wait_until_ready()
    for i in range(4):
        status, answer = api.complete([5 + i] * 20, max_tokens=4, request_id=f"paired-{i}", ignore_eos=True)
        assert (status, len(answer["choices"][0]["token_ids"])) == (200, 4)
        (attempt,) = api.record(f"paired-{i}")["attempts"]
        assert (attempt["mode"], attempt["prefill"], attempt["decode"]) == ("transfer", "prefill-a", "decode-of-8")
    (left_out,) = [worker for worker in api.workers() if worker["id"] == "decode-of-12"]
    assert [entry["field"] for entry in left_out["incompatible"]] == ["block_size"]


def test_one_token_needs_no_pair(cluster: Cluster) -> None:
    status, answer = cluster.trio.api.complete([5, 6, 7], max_tokens=1, request_id="alone")
    assert (status, len(answer["choices"][0]["token_ids"])) == (200, 1)
    (attempt,) = cluster.trio.api.record("alone")["attempts"]
    assert (attempt["mode"], attempt["decode"]) == ("serve", "prefill-a")
