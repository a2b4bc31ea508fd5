"""The images of a source: distinct by content, each decoded once, bad ones named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from realign.building import corpus as module
from realign.building.corpus import inspect_corpus
from realign.data.formats.source_row import SourceRow


@pytest.fixture
def rows(tmp_path: Path) -> list[SourceRow]:
    """Five images, of which the second is the first again; the first has two rows."""
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4 + number, 4), (10 * number, 0, 0)).save(path)
    shutil.copy(paths[0], paths[1])
    return [
        SourceRow(str(number), path.name, path, ({"role": "user", "content": "x"},), "y")
        for number, path in enumerate([*paths, paths[0]])
    ]


def test_byte_duplicates_are_one_image(rows: list[SourceRow], tmp_path: Path) -> None:
    corpus, refused = inspect_corpus(rows, tmp_path / "seen", workers=1)
    assert corpus.names == ["0.png", "2.png", "3.png", "4.png"]
    assert [corpus.position[row.path] for row in rows] == [0, 0, 1, 2, 3, 0]
    assert [(facts.width, facts.height) for facts in corpus.facts] == [
        (4, 4), (6, 4), (7, 4), (8, 4),
    ]  # fmt: skip
    assert refused == {}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the images that decoders are given, which get two at a time."""
    paths: list[Path] = []
    inspect = module.inspect_images
    monkeypatch.setattr(
        module,
        "inspect_images",
        lambda chunk, **options: paths.extend(chunk) or inspect(chunk, **options),
    )
    monkeypatch.setattr(module, "PART", 2)
    return paths


def test_images_seen_before_are_not_decoded_again(
    rows: list[SourceRow], tmp_path: Path, decoded: list[Path]
) -> None:
    corpus, _ = inspect_corpus(rows, tmp_path / "seen", workers=1)
    assert len(list((tmp_path / "seen").iterdir())) == 3
    Image.new("RGB", (9, 9), "white").save(rows[3].path)  # another image under the name
    decoded.clear()
    again, _ = inspect_corpus(rows, tmp_path / "seen", workers=1)
    assert decoded == [rows[3].path]
    assert again.facts[2].width == 9
    assert again.facts[3] == corpus.facts[3]
    decoded.clear()
    assert inspect_corpus(rows, tmp_path / "seen", workers=1)[0] == again
    assert decoded == []


def test_a_killed_inspection_is_continued(
    rows: list[SourceRow], tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inspect_corpus(rows, tmp_path / "whole", workers=1)
    decoded.clear()
    inspect = module.inspect_images

    def until_the_second(chunk: list[Path], **options: int) -> object:
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return inspect(chunk, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "inspect_images", until_the_second)
        with pytest.raises(KeyboardInterrupt):
            inspect_corpus(rows, tmp_path / "seen", workers=1)
    decoded.clear()
    assert inspect_corpus(rows, tmp_path / "seen", workers=1) == whole
    assert decoded == [row.path for row in rows[2:5]]


def test_a_file_that_cannot_be_read_is_refused_on_every_run(
    rows: list[SourceRow], tmp_path: Path
) -> None:
    inspect_corpus(rows, tmp_path / "seen", workers=1)
    rows[2].path.unlink()
    rows[2].path.mkdir()
    _, refused = inspect_corpus(rows, tmp_path / "seen", workers=1)
    assert list(refused) == [rows[2].path]


def test_unreadable_images_are_left_out_of_the_corpus(
    rows: list[SourceRow], tmp_path: Path
) -> None:
    rows[2].path.write_bytes(b"GIF89a")
    corpus, refused = inspect_corpus(rows, tmp_path / "seen", workers=2)
    assert corpus.names == ["0.png", "3.png", "4.png"]
    assert {path.name: error.code for path, error in refused.items()} == {"2.png": "format"}
