"""Records as parquet: complete, equal, readable by others, and read a row group at a time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from realign.data.formats.parquet import read_parquet, write_parquet
from realign.data.records import Record
from realign.errors import RefusedError


def test_parquet_round_trip_keeps_everything(tmp_path: Path, records) -> None:
    rows = records(5)
    rows[0] = dataclasses.replace(rows[0], meta={"retrieval": {"rank": 2}, "note": "ü"})
    path = tmp_path / "dataset.parquet"
    write_parquet(rows, path)
    assert list(read_parquet(path)) == rows
    assert list(tmp_path.iterdir()) == [path]


def test_non_finite_numbers_in_meta_become_null(tmp_path: Path, records) -> None:
    """Earlier versions wrote NaN, which is not valid JSON."""
    path = tmp_path / "dataset.parquet"
    write_parquet(records(1), path)
    table = pq.read_table(path).to_pylist()
    table[0]["meta"] = '{"similarity": {"value": NaN}, "big": 1e999}'
    pq.write_table(pa.Table.from_pylist(table), path)
    (record,) = read_parquet(path)
    assert record.meta == {"similarity": {"value": None}, "big": None}
    write_parquet([record], path)
    assert [*read_parquet(path)] == [record]


def test_equal_records_give_equal_bytes(tmp_path: Path, records) -> None:
    for name in ("a.parquet", "b.parquet"):
        write_parquet(records(5), tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_columns_are_the_ones_trl_reads(tmp_path: Path, records) -> None:
    from datasets import Dataset

    write_parquet(records(2), tmp_path / "d.parquet")
    row = Dataset.from_parquet(str(tmp_path / "d.parquet"), cache_dir=str(tmp_path / "c"))[0]
    assert list(row) == [
        "id",
        "images",
        "prompt",
        "chosen",
        "rejected",
        "rejected_images",
        "meta",
    ]
    assert row["images"][0].size == (96, 96)  # decoded by datasets: an Image column
    assert row["prompt"] == [{"role": "user", "content": "Describe the image."}]
    assert row["chosen"][0]["role"] == "assistant"


def test_the_parquet_schema_equals_that_of_datasets(tmp_path: Path, records) -> None:
    """The file is written without ``datasets``, whose import takes longer than an export."""
    from datasets import Features, Image, List, Value

    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            **dict.fromkeys(("prompt", "chosen", "rejected"), turns),
            "rejected_images": List(Image()),
            "meta": Value("string"),
        }
    )
    write_parquet(records(1), tmp_path / "d.parquet")
    written = pq.read_schema(tmp_path / "d.parquet")
    assert Features.from_arrow_schema(written) == features
    assert written.equals(features.arrow_schema)


@pytest.fixture
def grouped(tmp_path: Path, records) -> Path:
    """Twelve rows in row groups of about two."""
    path = tmp_path / "grouped.parquet"
    rows = records(12)
    size = sum(len(raw) for raw in (*rows[0].images, *rows[0].rejected_images))
    write_parquet((row for row in rows), path, row_group_bytes=int(1.5 * size))
    assert pq.read_metadata(path).num_row_groups > 4
    return path


def test_row_groups_do_not_change_the_rows(grouped: Path, tmp_path: Path, records) -> None:
    rows, read = records(12), read_parquet(grouped)
    assert list(read) == rows
    assert (read[-1], read[2:9:3], len(read)) == (rows[-1], rows[2:9:3], 12)
    with pytest.raises(IndexError, match="index out of range"):
        _ = read[12]
    from datasets import Dataset

    stored = Dataset.from_parquet(str(grouped), cache_dir=str(tmp_path / "c"))
    assert stored["chosen"][11] == [{"role": "assistant", "content": rows[11].chosen}]
    assert stored[11]["images"][0].size == (96, 96)


def test_reading_a_row_reads_only_its_row_group(grouped: Path, monkeypatch) -> None:
    groups = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        groups.append(group)
        return read_row_group(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    read = read_parquet(grouped)
    assert groups == []
    assert [read[11].id, read[11].id, read[0].id] == ["r11", "r11", "r0"]
    last = pq.read_metadata(grouped).num_row_groups - 1
    assert groups == [last, 0]


def test_a_large_dataset_is_written_group_by_group(tmp_path: Path) -> None:
    """The memory stays that of one row group, although the rows together have 200 MB."""
    raw = os.urandom(1_000_000)
    rows = (Record(str(i), (raw + b"%d" % i,), (), "a", "b") for i in range(200))
    # a pool of its own: the default one has seen the peaks of earlier tests
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        write_parquet(rows, tmp_path / "d.parquet")
    finally:
        pa.set_memory_pool(default)
    assert (tmp_path / "d.parquet").stat().st_size > 200_000_000
    assert read_parquet(tmp_path / "d.parquet")[150].images == (raw + b"150",)
    assert 0 < pool.max_memory() < 150_000_000


@pytest.mark.slow
def test_more_than_two_gib_of_images_are_written_and_read(tmp_path: Path) -> None:
    raw = os.urandom(45_000_000)
    rows = (Record(str(i), (raw,), (), f"a{i}", "b") for i in range(52))
    write_parquet(rows, tmp_path / "d.parquet")
    read = read_parquet(tmp_path / "d.parquet")
    assert (read[51].chosen, read[51].images) == ("a51", (raw,))


def test_a_file_that_is_not_parquet_or_lacks_columns_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "junk.parquet").write_text("junk")
    with pytest.raises(RefusedError, match=r"junk\.parquet must be a parquet file"):
        read_parquet(tmp_path / "junk.parquet")
    (tmp_path / "folder.parquet").mkdir()  # the system's error, as for a file without permission
    with pytest.raises(RefusedError, match=r"folder\.parquet must be a parquet file"):
        read_parquet(tmp_path / "folder.parquet")
    Dataset.from_dict({"images": [[]]}).to_parquet(tmp_path / "some.parquet")
    with pytest.raises(RefusedError, match=r"lacks \['prompt', 'chosen', 'rejected'\]"):
        read_parquet(tmp_path / "some.parquet")
    turn = {"role": "assistant", "content": "x"}
    for images, answer, message in (
        (
            [{"path": "a.png", "bytes": None}],
            [turn],
            r"row\.parquet, row 1 \(counting from 1\): images must be embedded as",
        ),
        (
            [],
            [],
            r"row 1 \(counting from 1\): (chosen|rejected) must be one assistant turn, got \[\]",
        ),
        ([], [turn, turn], "(chosen|rejected) must be one assistant turn, got .*, 'assistant'"),
    ):
        row = {"images": images, "prompt": [turn], "chosen": answer, "rejected": answer}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "row.parquet")
        with pytest.raises(RefusedError, match=message):
            list(read_parquet(tmp_path / "row.parquet"))
    part = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    row = {"images": [[]], "prompt": [part], "chosen": [[]], "rejected": [[]]}
    Dataset.from_dict(row).to_parquet(tmp_path / "parts.parquet")
    with pytest.raises(RefusedError, match="prompt must be a list of messages with a role and a"):
        list(read_parquet(tmp_path / "parts.parquet"))
