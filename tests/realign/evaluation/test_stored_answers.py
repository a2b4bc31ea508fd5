"""Stored answers are read again by id, those of earlier versions too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.stored_answers import Item, Question, make_batches, read_stored_answers
from tests.realign.evaluation.published import write_published


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_published("pope", tmp_path, tmp_path)
    write_published("vizwiz", tmp_path, tmp_path)
    return tmp_path


def lines() -> list[dict[str, Any]]:
    """Answers to two benchmarks, whose labels are yes, no, yes, no, in one file."""
    pope = [
        {"benchmark": "pope", "id": f"popular-{n}", "image": "", "prompt": "", "answer": answer}
        for n, answer in ((4, "No"), (1, "Yes"), (3, "No"), (2, " No\n"))
    ]
    vizwiz = [
        {"benchmark": "vizwiz", "id": str(n), "image": "", "prompt": "", "answer": answer}
        for n, answer in enumerate((" a ball\n", "cup"))
    ]
    return [*vizwiz, *pope]


def test_stored_answers_are_matched_by_id_and_other_benchmarks_are_ignored(data: Path) -> None:
    path = write(data / "base.jsonl", lines())
    assert score("pope", path, data)["splits"]["popular"]["accuracy"] == 0.75
    assert score("vizwiz", path, data)["splits"]["all"]["accuracy"] == 50.0
    write_published("mme", data, data)
    with pytest.raises(RefusedError, match="must hold answers of mme, got those of vizwiz, pope"):
        score("mme", path, data)


def test_missing_answers_and_answers_of_other_data_are_refused(data: Path) -> None:
    path = write(data / "base.jsonl", lines()[:-1])
    with pytest.raises(RefusedError, match="got answers to 3: 1 have no answer"):
        score("pope", path, data)
    path = write(data / "base.jsonl", [*lines(), {**lines()[-1], "id": "popular-9"}])
    with pytest.raises(RefusedError, match="1 answers are to no question of the data"):
        score("pope", path, data)


def test_answers_that_earlier_versions_stored_are_read(data: Path) -> None:
    rows = json.loads("[" + ",".join((data / "coco_pope_popular.json").read_text().split("\n")[:4])
                      + "]")  # fmt: skip
    old = [
        {"image": row["image"], "text": row["text"], "answer": "No", "is_cut": False}
        for row in rows
    ]
    assert score("pope", write(data / "old.jsonl", old), data)["splits"]["all"]["accuracy"] == 0.5


@pytest.mark.parametrize("change", ["a line is lost", "another id", "empty"])
def test_a_modified_answer_file_is_refused_before_it_is_scored(tmp_path: Path, change) -> None:
    stored = [{"benchmark": "pope", "id": str(n), "answer": "No", "is_cut": False, "tokens": 1}
              for n in range(3)]  # fmt: skip
    wanted = {("pope", str(n)) for n in range(3)}
    assert len(read_stored_answers(write(tmp_path / "a.jsonl", stored), wanted)) == 3
    changed = {"a line is lost": stored[:2], "another id": [*stored[:2], {**stored[2], "id": "9"}]}
    path = write(tmp_path / "a.jsonl", changed.get(change, []))
    with pytest.raises(
        RefusedError,
        match=r"a\.jsonl must hold the answers to the 3 questions of this run, got \d, first "
        r"different pope \d\. Remove the file",
    ):
        read_stored_answers(path, wanted)


def test_data_may_be_in_a_folder_named_after_its_benchmark(tmp_path: Path) -> None:
    write_published("pope", tmp_path / "pope", tmp_path)
    path = write(tmp_path / "base.jsonl", lines())
    assert score("pope", path, tmp_path) == score("pope", path, tmp_path / "pope")


def item(number: int, prompt: str, image: str | None, limit: int = 8) -> Item:
    question = Question(prompt, Path(f"/{image}") if image else None, image, limit)
    return Item("pope", "all", str(number), "", image, question, "")


def test_batches_hold_each_question_once_and_group_similar_ones() -> None:
    items = [
        item(0, "bbb", "x"),
        item(1, "a", "x"),
        item(2, "a", "y"),
        item(3, "cc", None),
        item(4, "a", "x"),  # again, as in another split
        item(5, "bb", "x", limit=9),
        item(6, "dddd", "x"),
    ]
    batches = make_batches(items, 2)
    assert [[(entry.prompt, entry.image_sha256) for entry in batch] for batch in batches[1:]] == [
        [("bbb", "x"), ("dddd", "x")],
        [("bb", "x")],
        [("cc", None)],
    ]
    assert {(entry.prompt, entry.image_sha256) for entry in batches[0]} == {("a", "x"), ("a", "y")}
    assert make_batches(items[::-1], 2) == batches
    moved = [one._replace(question=one.question._replace(image=Path("/z"))) for one in items[:1]]
    assert [entry.key for entry in make_batches(moved, 2)[0]] == [items[0].question.key]
