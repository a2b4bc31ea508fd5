"""The images of a source: distinct by content, each decoded once, bad ones named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from realign.build import corpus as module
from realign.build.corpus import inspect_corpus
from realign.build.row import SourceRow


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
    corpus, refused = inspect_corpus(rows, tmp_path / "none.jsonl", workers=1)
    assert corpus.names == ["0.png", "2.png", "3.png", "4.png"]
    assert [corpus.position[row.path] for row in rows] == [0, 0, 1, 2, 3, 0]
    assert [(facts.width, facts.height) for facts in corpus.facts] == [
        (4, 4), (6, 4), (7, 4), (8, 4),
    ]  # fmt: skip
    assert refused == {}


def test_images_seen_before_are_not_decoded_again(
    rows: list[SourceRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "images.jsonl"
    corpus, _ = inspect_corpus(rows, seen, workers=1)
    corpus.save(seen)
    Image.new("RGB", (9, 9), "white").save(rows[3].path)  # another image under the name
    decoded: list[Path] = []
    inspect = module.inspect_images
    monkeypatch.setattr(
        module,
        "inspect_images",
        lambda paths, **options: decoded.extend(paths) or inspect(paths, **options),
    )
    again, _ = inspect_corpus(rows, seen, workers=1)
    assert decoded == [rows[3].path]
    assert again.facts[2].width == 9
    assert again.facts[3] == corpus.facts[3]


def test_unreadable_images_are_no_part_of_it(rows: list[SourceRow], tmp_path: Path) -> None:
    rows[2].path.write_bytes(b"GIF89a")
    corpus, refused = inspect_corpus(rows, tmp_path / "none.jsonl", workers=2)
    assert corpus.names == ["0.png", "3.png", "4.png"]
    assert {path.name: error.code for path, error in refused.items()} == {"2.png": "format"}
