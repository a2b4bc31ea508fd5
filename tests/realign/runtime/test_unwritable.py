"""A full disk ends a command with the name of the file, and leaves nothing half written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.generation.journal import Journal
from realign.runtime.files import new_folder, replacing, write_json
from tests.realign.conftest import file_limit


def _in_a_new_folder(path: Path) -> None:
    with new_folder(path) as folder:
        write_json(folder / "small.json", 1)
        (folder / "large.txt").write_text("a" * 100)


def _in_a_journal(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("a", {"text": "a" * 100})


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, "a" * 100), _in_a_new_folder, _in_a_journal]
)
def test_a_write_error_names_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "a"
    with file_limit(50), pytest.raises(OSError, match="File too large") as caught:
        write(path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)


def test_a_read_only_disk_is_refused_with_the_file_name(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, **options: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)  # of a file that could not be created
    with pytest.raises(OSError, match="Read-only") as caught, replacing(tmp_path / "a") as file:
        refuse(file)
    assert caught.value.filename == str(tmp_path / "a")


def test_a_read_error_keeps_its_file_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")


def test_a_command_ends_without_a_traceback(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    with file_limit(10):
        result = CliRunner().invoke(app, ["init", "paper", "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"realign: {out} could not be written (EFBIG: File too large).")
    assert [*tmp_path.iterdir()] == []
