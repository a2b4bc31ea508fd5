"""Parquet files, folders of them and saved datasets, with images as bytes or as paths."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value

from realign.data.formats.parquet import write_parquet
from realign.data.formats.read_source import read_source
from realign.errors import RefusedError

COLUMNS = {name: Value("string") for name in ("question", "chosen", "rejected", "origin_split")}


def dataset(images: Path, names: tuple[str, ...] = ("a", "b", "a")) -> Dataset:
    """RLAIF-V's columns with embedded images; the third image is the first."""
    rows = {
        "ds_name": ["RLAIF-V"] * len(names),
        "image": [(images / f"{name}.jpg").read_bytes() for name in names],
        "question": [f"Question {i}?" for i in range(len(names))],
        "chosen": ["A good answer."] * len(names),
        "rejected": ["A bad answer."] * len(names),
        "origin_split": ['{"model": "llava15"}'] * len(names),
        "idx": list(range(len(names))),
    }
    rows["image"] = [{"bytes": raw, "path": f"x/{i}.jpg"} for i, raw in enumerate(rows["image"])]
    features = Features({"ds_name": Value("string"), "image": datasets.Image(), **COLUMNS})
    return Dataset.from_dict(rows, features=Features({**features, "idx": Value("int64")}))


@pytest.fixture
def table(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "train.parquet"
    dataset(images).to_parquet(path, batch_size=2)
    return path


def test_embedded_images_are_extracted_once(table: Path, images: Path, tmp_path: Path) -> None:
    extracted = tmp_path / "work" / "images"
    source = read_source(table, None, extract_to=extracted)
    assert (source.format, source.problems, source.num_read) == ("question", [], 3)
    digests = [hashlib.sha256((images / f"{n}.jpg").read_bytes()).hexdigest() for n in "ab"]
    assert sorted(path.name for path in extracted.iterdir()) == sorted(f"{d}.jpg" for d in digests)
    assert [row.image for row in source.rows] == [f"{digests[i]}.jpg" for i in (0, 1, 0)]
    for row, name in zip(source.rows, "aba", strict=True):
        assert row.path.read_bytes() == (images / f"{name}.jpg").read_bytes()
    assert source.rows[1].source["image"] == "x/1.jpg"
    assert source.rows[1].source["extra"] == {
        "ds_name": "RLAIF-V",
        "origin_split": '{"model": "llava15"}',
        "idx": 1,
    }
    before = {path: path.stat().st_mtime_ns for path in extracted.iterdir()}
    for path in extracted.iterdir():
        os.utime(path, ns=(1, 1))
    assert read_source(table, None, extract_to=extracted).rows == source.rows
    assert before.keys() == {*extracted.iterdir()}
    assert {path.stat().st_mtime_ns for path in extracted.iterdir()} == {1}


def test_an_image_that_cannot_be_written_is_refused_with_its_path(
    table: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    start = re.escape(str(tmp_path))
    with pytest.raises(RefusedError, match=rf"^{start}/file/.* written \(EEXIST: .* --out, and"):
        read_source(table, None, extract_to=tmp_path / "file")


def test_a_half_written_image_is_written_again(table: Path, tmp_path: Path) -> None:
    source = read_source(table, None, extract_to=tmp_path / "x")
    whole = source.rows[0].path.read_bytes()
    for damaged in (whole[:10], b"\0" * len(whole)):  # what a power cut leaves
        source.rows[0].path.write_bytes(damaged)
        read_source(table, None, extract_to=tmp_path / "x")
        assert source.rows[0].path.read_bytes() == whole


def test_a_folder_of_parquet_is_read_in_order(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, names in enumerate((("a",), ("b", "c"))):
        dataset(images, names).to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    source = read_source(folder, None, extract_to=tmp_path / "x")
    assert [row.id for row in source.rows] == ["0", "1", "2"]
    assert [row.prompt[0]["content"] for row in source.rows] == [
        "Question 0?",
        "Question 0?",
        "Question 1?",
    ]
    dataset(images).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(RefusedError, match=r"must be one split, got \['test', 'train'\] in"):
        read_source(folder, None)
    with pytest.raises(RefusedError, match=r"with neither, but parquet files in data\. Name the"):
        read_source(tmp_path, None)
    with pytest.raises(RefusedError, match=r"with neither\. Name the"):
        read_source(images, None)


def test_a_saved_dataset_is_read(tmp_path: Path, images: Path) -> None:
    rows = dataset(images)
    rows.select([2, 1]).save_to_disk(tmp_path / "saved")
    source = read_source(tmp_path / "saved", None, extract_to=tmp_path / "x")
    assert [row.source["extra"]["idx"] for row in source.rows] == [2, 1]
    assert source.rows[0].path.read_bytes() == (images / "a.jpg").read_bytes()
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(RefusedError, match=r"must be one split, got \['test', 'train'\]"):
        read_source(tmp_path / "both", None)
    assert len(read_source(tmp_path / "both" / "train", None, extract_to=tmp_path / "x").rows) == 3
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(b"x" * 100)
    with pytest.raises(RefusedError, match=r"must be a dataset that datasets has saved \("):
        read_source(tmp_path / "saved", None)


def test_paths_of_a_table_lie_under_the_image_folder(tmp_path: Path, images: Path) -> None:
    rows: dict[str, list[Any]] = {
        "images": [[{"bytes": None, "path": name}] for name in ("sub/d.jpg", "gone.jpg", "../x")],
        "prompt": ["x"] * 3,
        "answer": ["y", "y", None],
    }
    features = Features({"images": List(datasets.Image(decode=False)), "prompt": Value("string")})
    features["answer"] = Value("string")
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    source = read_source(tmp_path / "t.parquet", images)
    assert [(row.image, row.path) for row in source.rows] == [("sub/d.jpg", images / "sub/d.jpg")]
    assert [p.code for p in source.problems] == ["missing", "outside-root"]
    assert source.problems[0].place == "t.parquet, row 2 (counting from 1)"


def test_the_columns_of_rlaif_v_formatted_are_read(tmp_path: Path, images: Path) -> None:
    """HuggingFaceH4/rlaif-v_formatted has contents in parts and a list of images."""
    part = {"text": Value("string"), "type": Value("string")}
    message = {"content": List(part), "role": Value("string")}
    features = Features(
        {name: List(message) for name in ("chosen", "rejected", "prompt")}
        | {"images": List(datasets.Image())}
    )

    def turn(role: str, text: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": role, "content": [*before, {"type": "text", "text": text}]}]

    rows = {
        "chosen": [turn("assistant", "Good.")],
        "rejected": [turn("assistant", "Bad.")],
        "prompt": [turn("user", "What?", {"type": "image", "text": None})],
        "images": [[{"bytes": (images / "b.jpg").read_bytes(), "path": None}]],
    }
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    source = read_source(tmp_path / "t.parquet", None, extract_to=tmp_path / "x")
    (row,) = source.rows
    assert (source.format, row.instruction, row.answer, row.rejected) == (
        "trl",
        "What?",
        "Good.",
        "Bad.",
    )


def test_a_realign_parquet_file_is_a_source(tmp_path: Path, records) -> None:
    write_parquet(records(3), tmp_path / "d.parquet")
    source = read_source(tmp_path / "d.parquet", None, extract_to=tmp_path / "x")
    assert [(row.id, row.answer, row.rejected) for row in source.rows] == [
        (record.id, record.chosen, record.rejected) for record in records(3)
    ]
    assert [row.path.read_bytes() for row in source.rows] == [r.images[0] for r in records(3)]
    assert source.rows[0].source["extra"] == {"meta": "{}"}


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (b"GIF89a....", "format"),
        (b"\xff\xd8\xff" + b"x" * 50_000_000, "too-many-bytes"),
        (b"", "format"),
        (None, "missing-key"),
    ],
)
def test_embedded_bytes_that_are_not_an_image_are_reported(
    tmp_path: Path, images: Path, image: bytes | None, code: str
) -> None:
    good = {"image": (images / "a.jpg").read_bytes(), "prompt": "x", "answer": "y"}
    rows = [good, good | {"image": image}, good]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = read_source(tmp_path / "t.parquet", None, extract_to=tmp_path / "x")
    assert len(source.rows) == 2
    assert [problem.code for problem in source.problems] == [code]


def test_a_table_is_read_one_row_group_at_a_time(tmp_path: Path) -> None:
    """The memory stays small although the images together have 200 MB."""
    raw = b"\xff\xd8\xff" + os.urandom(1_000_000)
    schema = pa.schema({"image": pa.binary(), "prompt": pa.string(), "answer": pa.string()})
    with pq.ParquetWriter(tmp_path / "t.parquet", schema, use_dictionary=False) as writer:
        for group in range(20):
            rows = [
                {"image": raw + b"%d" % (10 * group + i), "prompt": "x", "answer": "y"}
                for i in range(10)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    code = (
        "import sys, pyarrow\n"
        "from pathlib import Path\n"
        "from realign.data.formats.read_source import read_source\n"
        "table, folder = map(Path, sys.argv[1:])\n"
        "assert len(read_source(table, None, extract_to=folder).rows) == 200\n"
        "print(pyarrow.default_memory_pool().max_memory())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "t.parquet"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000_000


def test_a_text_that_is_not_utf8_makes_only_its_row_bad(tmp_path: Path, images: Path) -> None:
    texts = pa.array([b"x", b"\xff\xfe", b"z"]).view(pa.string())
    columns = {"image": ["a.jpg"] * 3, "prompt": texts, "answer": ["y"] * 3}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = read_source(tmp_path / "t.parquet", images)
    assert [row.instruction for row in source.rows] == ["x", "z"]
    assert [(p.code, p.row) for p in source.problems] == [("utf-8", "2")]


def test_damaged_tables_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="extract_to must name a folder for the embedded images"):
        read_source(table, None)
    raw = bytearray(table.read_bytes())
    table.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(RefusedError, match=r"train\.parquet must be a whole parquet file \("):
        read_source(table, None, extract_to=tmp_path / "x")
    raw[4:2000] = b"\0" * 1996
    table.write_bytes(raw)
    with pytest.raises(RefusedError, match=r"train\.parquet must be a whole parquet file \("):
        read_source(table, None, extract_to=tmp_path / "x")
