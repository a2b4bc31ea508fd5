"""Missing images are found under longer names and in folders below and above, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.data.image_names import resolve_image
from realign.data.images import RefusedImage
from realign.data.missing_images import where_missing_images_are
from realign.data.records import Problem

NAMES = [f"{number:012d}.jpg" for number in range(5)]
OPTION = "build.image_name"


def problems(root: Path, names: list[str]) -> list[Problem]:
    found = []
    for number, name in enumerate(names):
        with pytest.raises(RefusedImage) as refused:
            resolve_image(root, name, f"row {number}")
        found.append(Problem.of(refused.value, str(number), f"row {number}"))
    return found


def fill(folder: Path, pattern: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / pattern.format(name)).touch()
    return folder


def test_a_file_with_a_longer_name_gives_the_image_name_option(tmp_path: Path) -> None:
    root = fill(tmp_path / "train2014", "COCO_train2014_{}")
    bad = problems(root, NAMES)
    assert where_missing_images_are(root, bad, 5, OPTION) == (
        "COCO_train2014_000000000000.jpg exists: pass --set build.image_name=COCO_train2014_{name}."
    )
    assert where_missing_images_are(root, bad, 5) == (
        "COCO_train2014_000000000000.jpg exists: rename the files to the names in the data."
    )


def test_the_right_folder_below_or_above_is_suggested(tmp_path: Path) -> None:
    folder = fill(tmp_path / "coco" / "train2017")
    bad = problems(tmp_path / "coco", NAMES)
    assert where_missing_images_are(tmp_path / "coco", bad, 5) == (
        f"{folder}/000000000000.jpg exists: pass --images {folder}."
    )
    bad = problems(folder, [f"coco/train2017/{name}" for name in NAMES])
    assert where_missing_images_are(folder, bad, 5, OPTION) == (
        f"{tmp_path}/coco/train2017/000000000000.jpg exists: pass --images {tmp_path}."
    )


def test_a_wrong_folder_and_name_give_both_options(tmp_path: Path) -> None:
    folder = fill(tmp_path / "coco" / "train2014", "COCO_train2014_{}")
    bad = problems(tmp_path / "coco", NAMES)
    assert where_missing_images_are(tmp_path / "coco", bad, 5, OPTION).endswith(
        f": pass --images {folder} --set build.image_name=COCO_train2014_{{name}}."
    )


def test_a_wrong_image_name_option_is_suggested_to_be_reset(tmp_path: Path) -> None:
    root = fill(tmp_path / "train2017")
    bad = problems(root, [f"none-{name}" for name in NAMES])
    bad = [Problem("", p.place, p.field, p.code, "", p.missing[5:]) for p in bad]
    assert where_missing_images_are(root, bad, 5, OPTION, "COCO_{name}") == (
        "000000000000.jpg exists: pass --set build.image_name={name}."
    )


def test_too_few_missing_rows_and_escaping_names_give_no_hint(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "COCO_{}")
    bad = problems(root, NAMES)
    assert where_missing_images_are(root, bad, 10, OPTION) == ""
    for name in NAMES[1:]:
        (root / f"COCO_{name}").unlink()
    assert where_missing_images_are(root, bad, 5, OPTION) == ""
    assert where_missing_images_are(root, [], 0, OPTION) == ""
    assert where_missing_images_are(None, bad, 5, OPTION) == ""
    fill(tmp_path)
    outside = [Problem("", p.place, p.field, p.code, "", f"../{p.missing}") for p in bad]
    assert where_missing_images_are(root, outside, 5, OPTION) == ""


def test_ambiguous_longer_names_give_no_hint(tmp_path: Path) -> None:
    root = fill(fill(tmp_path / "both", "COCO_train2014_{}"), "COCO_val2014_{}")
    assert where_missing_images_are(root, problems(root, NAMES), 5, OPTION) == ""
