"""A full disk ends a command with the name of the file, and leaves nothing half written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
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


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_opened_ends_a_command_without_a_traceback(
    tmp_path: Path, monkeypatch, number: int
) -> None:
    out = tmp_path / "recipe.yaml"

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)  # root may write everywhere
    result = CliRunner().invoke(app, ["init", "paper", "--out", str(out)])
    assert result.exit_code == 2, result.output
    reason = f"{errno.errorcode[number]}: {os.strerror(number)}"
    assert f"{out} must be a path that can be opened, got {reason}. Correct" in result.stderr


def test_a_new_folder_takes_the_place_that_a_link_names(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    _in_a_new_folder(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"small.json", "large.txt"}


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedError, match="must be a new folder, got the current one"):
        _in_a_new_folder(Path())
    assert [*tmp_path.iterdir()] == []
