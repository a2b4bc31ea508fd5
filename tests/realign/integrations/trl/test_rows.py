"""Rows in TRL's columns become the records that a cache was computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from realign.data.dataset import read_records
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.integrations.trl.rows import as_record, check_rows, with_image_bytes
from tests.realign.integrations.trl.stock import pairs

ROW: dict[str, Any] = {
    "images": [{"bytes": b"one", "path": None}],
    "rejected_images": [{"bytes": b"two", "path": None}],
    "prompt": [{"role": "user", "content": "What is it?"}],
    "chosen": [{"role": "assistant", "content": "A cup."}],
    "rejected": [{"role": "assistant", "content": "A key."}],
}


def test_dataset_rows_have_the_same_content_keys_as_realign_records(
    tmp_path: Path, records
) -> None:
    """A dataset made of a parquet file uses the cache that `realign cache` made for the file."""
    file = tmp_path / "d.parquet"
    write_parquet(records(4), file)
    dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c"))
    rows = [as_record(row) for row in with_image_bytes(dataset)]
    assert [row.key for row in rows] == [row.key for row in records(4)]
    assert [row.key for row in rows] == [row.key for row in read_records(file, None)]
    assert [row.id for row in rows] == [row.id for row in records(4)]


def test_a_parquet_saved_by_datasets_has_the_same_content_keys(tmp_path: Path, records) -> None:
    pairs(3).to_parquet(str(tmp_path / "d.parquet"))
    saved = read_records(tmp_path / "d.parquet", None)
    assert [row.key for row in saved] == [row.key for row in records(3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"image": {"bytes": b"one", "path": None}, "images": None},
        {"prompt": "What is it?", "chosen": "A cup.", "rejected": "A key."},
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "What is it?"},
                    ],
                }
            ]
        },
        {"tools": None, "chat_template_kwargs": {}},
    ],
)
def test_equivalent_forms_of_a_row_give_one_record(changes: dict[str, Any]) -> None:
    assert as_record({**ROW, **changes}).key == as_record(ROW).key


def test_an_image_column_of_file_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    row = {**ROW, "images": [{"bytes": None, "path": str(tmp_path / "a.png")}]}
    assert as_record(row).key == as_record(ROW).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": "[]"}, r"row with prompt .*: tools must be empty, got '\[\]'. Pass data_path"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs must be empty"),
        ({"chosen": None}, "chosen must be a list of turns"),
        ({"rejected": ROW["chosen"]}, "rejected_images must stand beside a rejected answer"),
        ({"rejected_images": 2 * ROW["rejected_images"]}, "rejected_images must be as many"),
        ({"rejected_images": ROW["images"]}, "must differ from image"),
        ({"images": [{"bytes": None, "path": "gone.png"}]}, "images must be files .* 'gone.png'"),
        ({"images": [{"bytes": None, "path": "https://a.b/c"}]}, "got 'https://a.b/c'"),
        ({"images": [object()]}, "images must be files of images, .* got object. Cast the column"),
        ({"id": "r7", "chosen": ""}, "row r7: chosen must be a non-empty string"),
    ],
)
def test_invalid_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        as_record({**ROW, **changes})


def test_a_dataset_is_checked_row_by_row() -> None:
    dataset = with_image_bytes(pairs(3))
    keys = [as_record(row).key for row in dataset]
    known = dict.fromkeys(keys, torch.zeros(3))
    check_rows(dataset, "train_dataset", known, 3)
    check_rows({"a": dataset}, "eval_dataset", None, 3)
    del known[keys[1]]
    with pytest.raises(RefusedError, match=r"lacks 1 of 3, first: eval_dataset\['a'\], row 2 "):
        check_rows({"a": dataset}, "eval_dataset", known, 3)
    with pytest.raises(
        RefusedError, match=r"reference must have 4 values per row, got shape \(3,\)"
    ):
        check_rows(dataset, "train_dataset", dict.fromkeys(keys, torch.zeros(3)), 4)
    values: Any = dict.fromkeys(keys, [0.0] * 3)
    with pytest.raises(RefusedError, match=r"to a tensor of log-probabilities, got list for train"):
        check_rows(dataset, "train_dataset", values, 3)


def test_images_are_left_undecoded_in_every_kind_of_dataset() -> None:
    dataset = pairs(2)
    single = dataset.map(lambda row: {"image": row["images"][0]}, remove_columns=["images"])
    for given in (dataset, dataset.to_iterable_dataset(), single):
        row = next(iter(with_image_bytes(given)))
        assert as_record(row).images
    parts = with_image_bytes(datasets.DatasetDict({"a": dataset}))
    assert isinstance(parts, datasets.DatasetDict)
    assert as_record(parts["a"][0]).images
    assert dataset[0]["images"][0].size  # the given one is as it was
