"""CHAIR on COCO: the published program's numbers for twelve captions, and the files of the data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation import compare, score
from realign.evaluation.answer_table import answer_table
from realign.evaluation.benchmarks.chair_coco import (
    mentions,
    noun_words,
    pattern_words,
    read_synonyms,
)

CASES = [  # caption, objects in the image, mentions of the official program, of lmms-eval if others
    ("A man rides a horse.", "person, horse", "person, horse"),
    ("Two men stand next to a bus.", "person, bus", "person", "bus"),
    ("Two buses are parked near a car and a car.", "bus", "bus, car, car"),
    ("A person sits on the toilet seat near a chair.", "toilet, person", "person, toilet, chair"),
    ("A passenger train and a hot dog stand.", "train", "train, hot dog"),
    ("A baby elephant walks beside people.", "elephant", "elephant, person"),
    (
        "She holds a wine glass and a tennis racket.",
        "wine glass, tennis racket",
        "wine glass, tennis racket",
    ),
    ("A cheesecake, a motor bike and an iPhone.", "cake, motorcycle, cell phone", ""),
    (
        "A teddy bear is on the bed. A dog is on the bed.",
        "teddy bear, bed",
        "teddy bear, bed, dog, bed",
    ),
    ("A plate of food with a glass of water.", "dining table, cup", ""),
    (
        "The bathroom has a toilet. The seat is up, and there is a chair.",
        "toilet",
        "toilet, chair",
    ),
    ("", "cat", ""),
]
# two spaces after a comma, and a capital letter, are as in the published file
SYNONYMS = """\
person, man, people
horse
bus
car
toilet
chair, seat
train
elephant
dog
hot dog
wine glass
tennis racket, racket
cake,  cheesecake
motorcycle,  motor bike, motorbike
cell phone, phone, iPhone
teddy bear
bear
bed
dining table, table
cup
cat
oven, stovetop, stove, stove top oven
"""
CATEGORIES = [line.split(",")[0] for line in SYNONYMS.splitlines()]
IDS = [i * 100 + 7 for i in range(len(CASES))]


def listed(text: str) -> list[str]:
    return text.split(", ") if text else []


def write_coco(folder: Path, objects: Iterable[str]) -> None:
    """Write the annotations of images; objects after the first stand in a caption of a person."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "synonyms.txt").write_text(SYNONYMS)
    for split in ("val", "train"):
        images, marks, captions = [], [], []
        for number, names in zip(IDS, objects, strict=True):
            if (number % 200 < 100) != (split == "val"):
                continue
            name = f"COCO_{split}2014_{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "height": 4})
            first, *others = listed(names)
            mark = {"image_id": number, "category_id": CATEGORIES.index(first), "bbox": [0.5, 1]}
            marks += [mark, mark]
            # the words "bus" and " cheesecake" would not be seen, so they are marked first
            caption = f"A picture of {' and '.join(others) or 'things'}."
            captions.append({"image_id": number, "id": number, "caption": caption})
        images.append({"id": 99, "file_name": "COCO_val2014_000000000099.jpg"})
        marks.append({"image_id": 99, "category_id": 0})
        categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES)]
        head = {"info": {}, "images": images}
        instances = {**head, "annotations": marks, "categories": categories}
        (folder / f"instances_{split}2014.json").write_text(json.dumps(instances))
        (folder / f"captions_{split}2014.json").write_text(
            json.dumps({**head, "annotations": captions})
        )


def first_marked(names: str) -> str:
    """Return objects in another order: first the one that a caption could not name."""
    return ", ".join(sorted(listed(names), key=lambda name: name not in ("bus", "cake")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_coco(tmp_path / "coco", [first_marked(case[1]) for case in CASES])
    return tmp_path / "coco"


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def captions(**more: Any) -> list[dict[str, Any]]:
    return [
        {"image_id": number, "caption": case[0], **more}
        for number, case in zip(IDS, CASES, strict=True)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_objects_that_a_caption_mentions_are_found(tmp_path: Path, case: tuple[str, ...]) -> None:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    objects = read_synonyms(tmp_path / "synonyms.txt")
    caption, _, official, *other = case
    assert mentions(pattern_words(caption), objects) == listed(official)
    assert mentions(noun_words(caption), objects) == listed(other[0] if other else official)


def test_objects_missed_by_the_official_program_are_missed(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    objects = read_synonyms(tmp_path / "synonyms.txt")
    unseen = "A bus. A cheesecake. A motor bike and an iPhone."
    assert mentions(pattern_words(unseen), objects) == []
    # a name of three words is never joined, so its words count
    assert mentions(pattern_words("A stove top oven."), objects) == ["oven", "oven"]
    # the word seat counts nowhere in a caption that names a toilet
    assert mentions(pattern_words("A seat by the toilet."), objects) == ["toilet"]
    assert mentions(pattern_words("A seat. A bow tie."), objects) == ["chair"]


@pytest.mark.parametrize("rule", ["official", "lmms-eval-nouns"])
def test_all_twelve_captions_have_the_expected_scores(
    tmp_path: Path, data: Path, rule: str
) -> None:
    scores = score("chair", write(tmp_path / "a.json", captions()), data, rule, bootstrap=20)
    found = scores["splits"]["all"]
    assert found["chair_i"] == pytest.approx(100 * 7 / 21)
    assert found["chair_s"] == pytest.approx(50)
    assert found["recall"] == pytest.approx(65)
    assert found["objects_per_caption"] == pytest.approx(21 / 12)
    words = sum(len(case[0].split()) for case in CASES)
    assert found["words_per_caption"] == pytest.approx(words / 12)
    assert (scores["items"], scores["images"], scores["unit"]) == (12, 12, "percent")
    low, high = scores["intervals"]["all"]["chair_s"]
    assert low < 50 < high


def test_every_caption_file_format_gives_the_same_scores(tmp_path: Path, data: Path) -> None:
    names = [f"COCO_val2014_{number:012d}.jpg" for number in IDS]
    texts = [case[0] for case in CASES]
    forms = {
        "official.json": {
            "overall": {"CIDEr": 0.5},
            "imgToEval": {str(row["image_id"]): row for row in captions(CIDEr=0.1)},
        },
        "strings.json": [{**row, "image_id": str(row["image_id"])} for row in captions()],
        "realign.json": [
            {"id": name, "question": "Describe.", "answer": text, "model": "x"}
            for name, text in zip(names, texts, strict=True)
        ],
        "own.json": [
            {"image": f"val2014/{name}", "text": "Describe.", "answer": text, "is_cut": False}
            for name, text in zip(names, texts, strict=True)
        ],
        "ids.json": [{"id": i, "answer": text} for i, text in zip(IDS, texts, strict=True)],
    }
    paths = [write(tmp_path / name, content) for name, content in forms.items()]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in captions()))
    found = [score("chair", path, data)["splits"] for path in [*paths, lines]]
    assert all(splits == found[0] for splits in found)
    assert found[0]["all"]["recall"] == pytest.approx(65)


def test_scored_images_come_from_the_answers_or_a_list(tmp_path: Path, data: Path) -> None:
    part = write(tmp_path / "part.json", captions()[:3])
    scores = score("chair", part, data)
    assert (scores["items"], scores["subset"]) == (3, None)
    other = write(tmp_path / "other.json", [*captions()[:2], {"image_id": 98, "caption": "x"}])
    with pytest.raises(RefusedError, match=r"1 answers are to no question.*other\.json, entry 3"):
        score("chair", other, data)
    twice = write(tmp_path / "twice.json", [*captions()[:2], captions()[0]])
    with pytest.raises(RefusedError, match="1 answers are to a question again"):
        score("chair", twice, data)

    (data / "image_ids.txt").write_text("".join(f"{number}\n" for number in IDS[:4]))
    with pytest.raises(RefusedError, match="each of the 4 questions of the data once, got answers"):
        score("chair", part, data)
    assert score("chair", part, data, allow_subset=True)["subset"] == "3 of 4"
    (data / "image_ids.txt").write_text("7\n98\n")
    with pytest.raises(RefusedError, match=r"image_ids\.txt must list images of COCO, got '98'"):
        score("chair", part, data)
    (data / "image_ids.txt").write_text("\n")
    with pytest.raises(RefusedError, match="must list at least one image"):
        score("chair", part, data)


def test_chair_without_a_mention_is_null(tmp_path: Path, data: Path) -> None:
    nothing = [{**row, "caption": "It is nice."} for row in captions()]
    scores = score("chair", write(tmp_path / "a.json", nothing), data)
    assert scores["splits"]["all"]["chair_i"] is None
    assert scores["splits"]["all"]["chair_s"] == 0
    assert "divides by 0" in scores["note"]


@pytest.mark.parametrize(
    "name",
    [
        "instances_train2014.json",
        "captions_val2014.json",
        "captions_train2014.json",
        "synonyms.txt",
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, data: Path, name: str) -> None:
    answers = write(tmp_path / "a.json", captions())
    (data / name).unlink()
    with pytest.raises(RefusedError, match=f"data requires {name} beside instances_val2014.json"):
        score("chair", answers, data)
    (data / "instances_val2014.json").unlink()
    with pytest.raises(RefusedError, match=r"files of CHAIR \(instances_val2014\.json"):
        score("chair", answers, data)


def test_the_folder_layout_of_the_published_archive_is_read(tmp_path: Path, data: Path) -> None:
    answers = write(tmp_path / "a.json", captions())
    wanted = score("chair", answers, data)
    folder = data / "annotations"
    folder.mkdir()
    for path in data.glob("*2014.json"):
        path.rename(folder / path.name)
    assert score("chair", answers, data) == wanted


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("instances_val2014.json", '"annotations"', '"marks"', "must have the list annotations"),
        ("instances_val2014.json", '"category_id": 0', '"category_id": 77', "got 77"),
        ("instances_val2014.json", '"name": "cat"', '"name": "lynx"', "word of synonyms.*'lynx'"),
        ("instances_train2014.json", '"image_id": 1', '"image_id": "x1', "must be JSON"),
        ("captions_val2014.json", '"image_id": 7,', '"image_id": "7",', "must be an integer"),
        (
            "captions_val2014.json",
            '"caption": "A',
            '"text": "A',
            "must have the keys .'caption'., got",
        ),
        ("synonyms.txt", "horse\n", "\n", "line 2 must hold words"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, data: Path, name: str, old: str, new: str, message: str
) -> None:
    path = data / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RefusedError, match=message) as error:
        score("chair", write(tmp_path / "a.json", captions()), data)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"imgToEval": []}, "must hold the captions of at least one image by imgToEval"),
        ({"imgToEval": {"1": 3}}, "must be an object"),
        ({"imgToEval": {"1": {"image_id": 1}}}, "must have one of these sets of fields"),
        ([{"image_id": 7, "caption": 3}], "caption must be a string"),
        ([{"image_id": [7], "caption": "x"}], "image_id must be a string or a number"),
    ],
)
def test_damaged_captions_are_refused(
    tmp_path: Path, data: Path, content: Any, message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        score("chair", write(tmp_path / "a.json", content), data)


def test_the_score_command_accepts_chair(tmp_path: Path, data: Path) -> None:
    answers = write(tmp_path / "a.json", captions())
    arguments = ["eval", "score", "--benchmark", "chair", "--data", str(data)]
    arguments += ["--answers", str(answers)]
    shown = CliRunner().invoke(app, [*arguments, "--rule", "official"])
    assert shown.exit_code == 0
    assert "33.33" in shown.output
    unknown = CliRunner().invoke(app, [*arguments, "--rule", "mine"])
    assert unknown.exit_code == 2
    assert "object-list" in unknown.output.replace("\n", " ")


def test_the_refusal_names_the_rule_that_reads_the_folder(tmp_path: Path, data: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    row = {"image": "a.jpg", "text": "Describe the image.", "objects": ["dog"]}
    (own / "chair.jsonl").write_text(json.dumps(row))
    path = write(tmp_path / "a.json", [{**row, "answer": "A dog."}])
    rule = r"has chair\.jsonl\. Pass --rule object-list, which reads that"
    with pytest.raises(RefusedError, match=rule):
        score("chair", path, own)
    with pytest.raises(RefusedError, match=rule):
        compare("chair", {"base": path}, own)
    (own / "chair_objects.json").write_text(json.dumps({"dog": ["dog"]}))
    found = score("chair", path, own, "object-list")
    console = Console(file=StringIO(), width=80)
    console.print(answer_table(found))
    assert console.file.getvalue().rstrip(" \n").split("\n")[-1].rstrip() == "Values are fractions."
    others = r"has instances_val2014\.json\. Pass --rule official or lmms-eval or lmms-eval-nouns"
    with pytest.raises(RefusedError, match=others):
        score("chair", path, data, "object-list")


def test_answers_to_other_benchmarks_are_ignored(tmp_path: Path, data: Path) -> None:
    stored = [
        {"benchmark": "chair", "id": str(IDS[0]), "answer": CASES[0][0]},
        {"benchmark": "vizwiz", "id": str(IDS[1]), "answer": "unanswerable"},
    ]
    path = tmp_path / "stored.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in stored))
    assert score("chair", path, data)["items"] == 1
