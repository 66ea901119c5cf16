"""What a folder says about itself without torch: found or refused in one sentence, fingerprint, generation defaults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.model.checkpoints import edit_json, shard
from support.model.families import save_family

from disagg.engine.model.checkpoint import (
    GenerationDefaults,
    ModelRefused,
    fingerprint,
    generation_defaults,
    resolve_model,
)
from disagg.engine.model.weights import read_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


# --- resolve_model ------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["missing", "./missing", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelRefused, match=f"`{name}` does not exist; give a folder"):
        resolve_model(name)


def test_a_hub_id_that_is_not_cached_offline_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    code = (
        "import sys\n"
        "from disagg.engine.model.checkpoint import ModelRefused, resolve_model\n"
        "try: resolve_model('owner/name')\n"
        "except ModelRefused as refused: print(refused)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "`owner/name` is no folder here, is not in the hub's cache" in done.stdout


def test_a_cached_hub_id_is_found_offline(folder: Path, tmp_path: Path) -> None:
    repo, revision = tmp_path / "hub" / "models--owner--name", "0" * 40
    shutil.copytree(folder, repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    code = "from disagg.engine.model.checkpoint import resolve_model; print(resolve_model('owner/name'))"
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(repo / "snapshots" / revision), done.stderr


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
            "no usable weight_map",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "no usable weight_map",
        ),
    ],
)
def test_a_damaged_folder_is_one_sentence(damage: object, sentence: str, folder: Path) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelRefused, match=sentence):
        resolve_model(str(folder))


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"lacks model-00002-of-00003\.safetensors"):
        resolve_model(str(folder))


@pytest.mark.parametrize("length", [0, 7, 8, 200])
def test_a_truncated_weights_file_is_one_sentence(length: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelRefused, match="no whole safetensors file"):
        read_tensors(folder)


# --- fingerprint --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_model_not_of_its_files(folder: Path) -> None:
    whole = [fingerprint(folder, verify_weights=verify) for verify in (False, True)]
    assert whole[0] != whole[1]
    shard(folder, 3)
    edit_json(folder / "config.json", transformers_version="9.9", _name_or_path="elsewhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert [fingerprint(folder, verify_weights=verify) for verify in (False, True)] == whole


def test_the_order_of_shards_does_not_count(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    shard(folder, 2)
    shard(other, 4, order=-1)
    assert fingerprint(folder) == fingerprint(other)


def test_config_tokenizer_and_weights_each_count(folder: Path) -> None:
    seen = {fingerprint(folder)}
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    seen.add(fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(fingerprint(folder))
    flip(folder / "tokenizer.json", 10)
    seen.add(fingerprint(folder))
    flip(folder / "model.safetensors", read_tensors(folder)[0].start)
    seen.add(fingerprint(folder))
    assert len(seen) == 5


def test_a_byte_between_samples_is_seen_by_verify_weights_alone(folder: Path) -> None:
    largest = max(read_tensors(folder), key=lambda entry: entry.nbytes)
    assert largest.nbytes > 4 * 4096
    before = [fingerprint(folder, verify_weights=verify) for verify in (False, True)]
    flip(largest.path, largest.start + 4096 + 100)
    after = [fingerprint(folder, verify_weights=verify) for verify in (False, True)]
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- generation_defaults ------------------------------------------------------------------------------------


def test_sampling_defaults_are_taken_as_vllm_takes_them(folder: Path) -> None:
    edit_json(
        folder / "generation_config.json",
        eos_token_id=[7, 9],
        bos_token_id=5,
        temperature=0.6,
        top_k=64,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=99,
    )
    assert generation_defaults(folder) == GenerationDefaults(
        eos_token_ids=(7, 9, 2),  # 2 is the tokenizer's own
        temperature=0.6,
        top_k=64,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
        max_tokens=99,
        bos_token_id=5,
    )


def test_without_a_generation_config_the_config_says_where_text_ends(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=4, bos_token_id=None, text_config={"eos_token_id": 8})
    assert generation_defaults(folder) == GenerationDefaults(eos_token_ids=(4,))
    edit_json(folder / "config.json", eos_token_id=None)
    assert generation_defaults(folder) == GenerationDefaults(eos_token_ids=(8,))


def test_nulls_and_minus_one_are_off(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=3)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 3, "top_p": None, "top_k": -1, "temperature": None}))
    assert generation_defaults(folder) == GenerationDefaults(eos_token_ids=(3, 2), bos_token_id=1)


def test_a_default_that_is_no_number_is_refused(folder: Path) -> None:
    edit_json(folder / "generation_config.json", temperature="hot")
    with pytest.raises(ModelRefused, match="a sampling default that is no number"):
        generation_defaults(folder)
