"""The folder of an export: whole or absent, refused where something else is, the same twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.data.decisions import Decision, append_decision, decisions_path
from realign.data.export import run
from realign.data.export.folder import ImageFolder
from realign.data.export.run import WRITERS, export
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError


@pytest.fixture
def data(tmp_path: Path, built) -> Path:
    write_parquet(built, tmp_path / "d.parquet")
    return tmp_path / "d.parquet"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", WRITERS)
def test_repeating_an_export_changes_nothing_and_a_different_export_is_refused(
    data: Path, tmp_path: Path, built, to: str
) -> None:
    out = tmp_path / "below" / "out"
    first = export(data, None, to, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert json.loads((out / "export.json").read_text())["counts"] == first.counts
    assert export(data, None, to, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = next(name for name in WRITERS if name != to)
    with pytest.raises(RefusedError, match=r"out must be a new or empty folder, .*export\.json"):
        export(data, None, other, out)
    append_decision(decisions_path(data), Decision(built[0].id, built[0].key, "drop"))
    changed = r"hold an export of the present rows of .*out with an export of other rows\."
    with pytest.raises(RefusedError, match=changed):
        export(data, None, to, out)
    decisions_path(data).unlink()
    write_parquet(built[:3], data)
    with pytest.raises(RefusedError, match=changed):
        export(data, None, to, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("to", WRITERS)
def test_equal_datasets_give_equal_folders(data: Path, tmp_path: Path, to: str) -> None:
    for name in "ab":
        export(data, None, to, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_folder_with_other_files_is_refused_and_unchanged(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match=r"got .*out with mine\.txt\. Choose another --out\."):
        export(data, None, "trl", out)
    (out / "mine.txt").unlink()
    export(data, None, "trl", out)  # an empty one is as good as none
    assert sorted(path.name for path in out.iterdir()) == ["dataset.parquet", "export.json"]
    with pytest.raises(RefusedError, match="out must be a folder, got"):
        export(data, None, "trl", data / "below")


def test_an_export_that_fails_leaves_nothing(data: Path, tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export(data, None, "official", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]


def test_leftover_files_of_a_killed_run_do_not_affect_the_next(data: Path, tmp_path: Path) -> None:
    """The next run in a container may have the same process id."""
    for name in (f".out.{os.getpid()}.tmp", ".out.tmp"):
        (tmp_path / name).mkdir()
    export(data, None, "trl", tmp_path / "out")
    assert (tmp_path / "out" / "export.json").is_file()


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_an_export_folder_has_the_default_permissions(
    data: Path, tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        export(data, None, "official", tmp_path / "out")
        (tmp_path / "usual").mkdir()
    finally:
        os.umask(before)
    modes = {(tmp_path / name).stat().st_mode for name in ("out", "usual", "out/images")}
    assert len(modes) == 1


def test_unknown_targets_and_empty_datasets_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"to must be one of \['official', .* got 'csv'"):
        export(data, None, "csv", tmp_path / "out")
    write_parquet([], data)
    with pytest.raises(RefusedError, match="data must have at least one row, got none"):
        export(data, None, "trl", tmp_path / "out")


def test_equal_images_share_a_name_and_others_are_renamed(tmp_path: Path) -> None:
    images = ImageFolder(tmp_path / "images")
    png = b"\x89PNG\r\n\x1a\n"
    assert images.add(png, "a/b.png") == "a/b.png"
    assert images.add(png, "a/b.png") == "a/b.png"
    assert (len(images), images.renamed) == (1, 0)
    hashed = images.add(png, None)
    assert hashed.endswith(".png")
    assert images.renamed == 0
    bad = ("a", "a/b.png/c", "../x", "/x", "x/", "x/.", "a/../../x", "data:x", "s3://x", "\ud800")
    for name in (*bad, "n\0", "y" * 256, "ü" * 128, "a/" * 3000 + "b", "ü/" * 400 + "b"):
        assert images.add(png, name) == hashed
    assert images.renamed == len(bad) + 5
    assert images.add(b"other", "a/b.png") != "a/b.png"
    assert images.add(b"RIFF....WEBP", "").endswith(".webp")
    assert images.add(b"\xff\xd8\xff", None).endswith(".jpg")
    assert len(tree(tmp_path / "images")) == len(images) == 5


def test_the_export_command_reports_the_written_files(data: Path, tmp_path: Path) -> None:
    arguments = ["export", "--data", data, "--to", "llamafactory", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "4 image pairs, in rdpo.jsonl alone" in result.output
    assert f"llamafactory -> {tmp_path / 'out'}: answer pairs alone" in result.output
    result = CliRunner().invoke(app, [str(a) for a in arguments[:-1]] + [str(tmp_path)])
    assert result.exit_code == 2
    assert "out must be a new or empty folder" in result.output
