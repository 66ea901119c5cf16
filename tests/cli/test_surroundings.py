"""A folder that was deleted and a root without a writable temporary folder end no command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from disagg.cli.surroundings import leave_deleted_folder, name_temporary_folder


def test_a_deleted_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(tmp_path)  # what is put back afterwards
    os.chdir(gone)
    gone.rmdir()
    leave_deleted_folder()
    assert os.getcwd() == "/"


def test_a_folder_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave_deleted_folder()
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(("can_be_written", "folder"), [(True, "/dev/shm"), (False, "/")])
def test_a_read_only_root_has_a_name_for_temporary_files(
    can_be_written: bool, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_usable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "_get_default_tempdir", none_usable)
        patch.setattr(os, "access", lambda folder, mode: can_be_written)
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        name_temporary_folder()
        assert tempfile.gettempdir() == os.environ["TORCHINDUCTOR_CACHE_DIR"] == folder
        patch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_a_temporary_folder_that_can_be_written_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = tempfile.gettempdir()
    name_temporary_folder()
    assert tempfile.gettempdir() == before
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_command_runs_without_home_and_in_a_deleted_folder(tmp_path: Path) -> None:
    code = f"import os; os.mkdir({str(tmp_path / 'x')!r}); os.chdir({str(tmp_path / 'x')!r}); os.rmdir(os.getcwd())\n"
    code += "import sys; sys.argv[1:] = ['version']; from disagg.__main__ import run; run()"
    environ = {name: value for name, value in os.environ.items() if name not in {"HOME", "TMPDIR", "USER"}}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert (done.returncode, done.stderr) == (0, "")
