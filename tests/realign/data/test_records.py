"""Records: content keys, the authors' JSON, and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from realign.data.dataset import read_records
from realign.data.problems import check_records
from realign.errors import RefusedError
from realign.runtime.files import content_sha256
from tests.realign.conftest import write_authors_images


def test_the_key_depends_only_on_the_content(records) -> None:
    (record,) = records(1)
    same = dataclasses.replace(record, id="other", meta={"x": 1})
    assert same.key == record.key
    changes: list[dict[str, Any]] = [
        {"chosen": record.chosen + " "},
        {"rejected": record.rejected[:-1]},
        {"prompt": ({"role": "user", "content": "Describe this image."},)},
        {"images": record.rejected_images},
        {"rejected_images": record.images},
        {"rejected_images": ()},
        {"images": record.images + record.rejected_images, "rejected_images": ()},
    ]
    keys = {dataclasses.replace(record, **change).key for change in changes} | {record.key}
    assert len(keys) == len(changes) + 1


def test_the_content_hash_separates_neighbouring_parts() -> None:
    assert content_sha256("ab", "c") != content_sha256("a", "bc")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"chosen": "  "}, r"row r0: chosen must not be empty, got '  '. Remove"),
    "equal": ({"rejected": None}, r"row r0: rejected must differ from chosen, got 'There is"),
    "placeholder": (
        {"rejected": "A house <image>."},
        r"row r0: rejected must not contain the special token '<image>', got 'A house <image>\.'",
    ),
    "special": (
        {"chosen": "A house.</s>"},
        r"token '</s>', got .*; the chat template ends the answer",
    ),
    "prompt": (
        {"prompt": ({"role": "user", "content": "<image> What?"},)},
        r"row r0: prompt must not contain the special token '<image>'",
    ),
    "same image": ({"rejected_images": None}, r"row r0: retrieved_image must differ from image"),
    "two for one": (
        {"rejected_images": (b"a", b"b")},
        "row r0: rejected_images must be as many as images, or none, got 2 for 1",
    ),
    "one for none": ({"images": ()}, "rejected_images must be as many as images.* got 1 for 0"),
    "unreadable": ({"images": (b"junk",)}, r"row r0, images: image must be a readable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_by_name_value_and_remedy(case: str, records) -> None:
    (record,) = records(1)
    change, message = BAD[case]
    same = {"rejected": record.chosen, "rejected_images": record.images}
    change = {name: same[name] if value is None else value for name, value in change.items()}
    with pytest.raises(RefusedError, match=message):
        check_records([dataclasses.replace(record, **change)], ["</s>", "<image>"])


def test_an_embedded_image_is_named_by_row_column_and_source_file(records) -> None:
    (record,) = records(1)
    bad = dataclasses.replace(record, rejected_images=(b"junk",))
    with pytest.raises(RefusedError, match="row r0, rejected_images: image must be a readable"):
        check_records([bad], [])
    known = dataclasses.replace(bad, meta={"source": {"retrieved_image": "b.png"}})
    with pytest.raises(RefusedError, match=r"row r0, rejected_images 'b\.png': image must be a"):
        check_records([known], [])


def test_all_bad_rows_are_counted_and_five_of_a_kind_are_shown(records) -> None:
    rows = [dataclasses.replace(record, chosen="") for record in records(23)]
    with pytest.raises(RefusedError, match=r"^23 problem.* in 23 rows:") as refused:
        check_records(rows, [])
    lines = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == [f"row r{i}" for i in range(5)]
    assert lines[-1] == "... and 18 more (empty in chosen)"


def test_problems_are_grouped_by_kind_with_the_most_frequent_first(records) -> None:
    rows = [dataclasses.replace(record, rejected="") for record in records(9)]
    rows[0] = dataclasses.replace(rows[0], rejected="A dog.", images=(b"junk",))
    with pytest.raises(RefusedError) as refused:
        check_records(rows, [])
    lines = str(refused.value).splitlines()
    assert lines[6:] == [
        "... and 3 more (empty in rejected)",
        next(line for line in lines if line.startswith("row r0, images: image must be a read")),
    ]


def test_an_empty_list_of_rows_is_refused() -> None:
    with pytest.raises(RefusedError, match="at least one row, got none"):
        check_records([], [])


@pytest.fixture
def official(tmp_path: Path, records) -> Path:
    """Write the published layout, pref_data.json and one image folder, and return the JSON."""
    rows = write_authors_images(records(3), tmp_path / "images")
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps(rows))
    return path


def test_official_json_reads_as_the_same_pairs(official: Path, records) -> None:
    read = read_records(official, official.parent / "images")
    assert [record.key for record in read] == [record.key for record in records(3)]
    assert read[1].meta["source"] == {
        "file": "pref_data.json",
        "index": 1,
        "image": "1.png",
        "retrieved_image": "1r.png",
    }


def test_a_row_is_named_by_its_file_and_its_id_or_number(official: Path) -> None:
    rows = json.loads(official.read_text())
    rows[0]["id"] = "first"
    rows[0]["chosen"][1]["content"] = rows[1]["chosen"][1]["content"] = " "
    official.write_text(json.dumps(rows))
    with pytest.raises(RefusedError) as refused:
        check_records(read_records(official, official.parent / "images"), [])
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()[1:]] == [
        "pref_data.json, row first",
        "pref_data.json, row 2 (counting from 1)",
    ]


def test_a_special_token_is_shown_with_its_surroundings(records) -> None:
    (record,) = records(1)
    text = "long " * 40 + "before </s> after" + " and on" * 40
    with pytest.raises(RefusedError, match=r"got '\.\.\..*before </s> after and on.*\.\.\.'\. Rem"):
        check_records([dataclasses.replace(record, chosen=text)], ["</s>"])


def test_official_row_without_image_is_text_only(official: Path) -> None:
    rows = json.loads(official.read_text())
    del rows[0]["image"], rows[0]["retrieved_image"]
    for name in ("chosen", "rejected"):
        rows[0][name][0]["content"] = "What is red?"
    official.write_text(json.dumps(rows))
    record = read_records(official, official.parent / "images")[0]
    assert record.images == record.rejected_images == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": "gone.png"},
            r"image 'gone.png' does not exist",
        ),
        (
            {"retrieved_image": None},
            r"retrieved_image is missing beside image '1.png'",
        ),
        (
            {"image": None},
            r"image is missing beside retrieved_image '1r.png'",
        ),
        ({"image": 3}, r"image must be a file name, got 3"),
        ({"image": "a\0b"}, r"image must be a file name, got 'a\\x00b'"),
        (
            {"chosen": ["x", "y"]},
            r"chosen must be a list of messages with a role and a str",
        ),
        (
            {"chosen": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            r"chosen must be a list of messages .*Put the text itself into content",
        ),
        ({"chosen": None}, r"a row must have the keys \['chosen'\], got"),
        (
            {"chosen": [{"role": "user", "content": "x"}]},
            r"chosen must alternate",
        ),
        (
            {
                "chosen": [
                    {"role": "user", "content": "Another question"},
                    {"role": "assistant", "content": "x"},
                ]
            },
            r"chosen and rejected must differ in the last answer only",
        ),
    ],
)
def test_bad_rows_of_the_authors_layout_are_refused(
    official: Path, change: dict[str, Any], message: str
) -> None:
    rows = json.loads(official.read_text())
    for name, value in change.items():
        rows[1].pop(name)
        if value is not None:
            rows[1][name] = value
    official.write_text(json.dumps(rows))
    with pytest.raises(
        RefusedError, match=rf"pref_data\.json, row 2 \(counting from 1\): {message}"
    ):
        read_records(official, official.parent / "images")


@pytest.mark.parametrize(
    ("text", "has_image", "found"),
    [("<image>\nWhat?", False, "1 for 0"), ("<image>\n<image>What?", True, "2 for 1")],
)
def test_placeholders_without_an_image_are_refused(
    official: Path, text: str, has_image: bool, found: str
) -> None:
    rows = json.loads(official.read_text())
    for name in ("chosen", "rejected"):
        rows[1][name][0]["content"] = text
    if not has_image:
        del rows[1]["image"], rows[1]["retrieved_image"]
    official.write_text(json.dumps(rows))
    with pytest.raises(RefusedError, match=rf"row 2 .*chosen must have at most .* got {found}\."):
        read_records(official, official.parent / "images")


def test_all_missing_images_are_named_at_once(official: Path) -> None:
    images = official.parent / "images"
    for name in ("0.png", "2.png", "2r.png"):
        (images / name).unlink()
    with pytest.raises(RefusedError) as refused:
        read_records(official, images)
    first, *lines = str(refused.value).splitlines()
    assert first == "3 problem(s) in 3 rows:"
    assert [line.split("'")[1] for line in lines] == ["0.png", "2.png", "2r.png"]
    rows = json.loads(official.read_text())
    official.write_text(json.dumps(rows * 8))
    with pytest.raises(
        RefusedError, match=r"^24 problem.* in 24 rows:(?s:.*)and 11 more \(missing in image\)"
    ):
        read_records(official, images)


def test_the_right_folder_below_the_given_one_is_suggested(official: Path) -> None:
    images = official.parent / "images"
    with pytest.raises(RefusedError) as refused:
        read_records(official, official.parent)
    *_, last = str(refused.value).splitlines()
    assert last == f"{images}/0.png exists: pass --images {images}."


def test_an_image_folder_that_does_not_exist_is_named(official: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"images must be an existing folder, got .*nodir\. Ch"):
        read_records(official, tmp_path / "nodir")


def test_official_rows_must_be_objects(official: Path) -> None:
    official.write_text("[1]")
    with pytest.raises(
        RefusedError, match=r"pref_data\.json, row 1 \(counting from 1\) must be an object, got 1"
    ):
        read_records(official, official.parent / "images")


def test_missing_and_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="which does not exist"):
        read_records(tmp_path / "none.json", tmp_path)
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(RefusedError, match=r"must end in \.parquet, \.json or \.jsonl, got d"):
        read_records(tmp_path / "d.txt", None)
    (tmp_path / "d.json").write_text("[")
    with pytest.raises(RefusedError, match="Pass --images FOLDER"):
        read_records(tmp_path / "d.json", None)
    with pytest.raises(RefusedError, match=r"d\.json, row 1: the file must be JSON"):
        read_records(tmp_path / "d.json", tmp_path)
    for text, message in (
        ("", r"d\.json, line 1 must be JSON, got ''"),
        ('{\n"rows": []\n}', "must be a list of rows, or have one row per line, got dict"),
        ("3", "must be a list of rows, or have one row per line, got int"),
        ("{}", r"data must have rows of a known layout, got rows with keys \[\] in d\.json"),
    ):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(RefusedError, match=message):
            read_records(tmp_path / "d.json", tmp_path)
