"""ScienceQA against the values of LLaVA's script, lmms-eval and VLMEvalKit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.evaluation import score
from realign.evaluation.benchmarks.scienceqa import SCIENCEQA
from realign.evaluation.rows import rows_digest

CASES = [  # text, number of choices, right letter, has an image, right by each rule
    ("A", 2, "A", True, 1, 1, 1),
    ("B.", 3, "B", True, 0, 1, 1),
    ("B. the answer", 3, "B", False, 1, 1, 1),
    ("The answer is C.", 4, "C", True, 1, 0, 1),
    ("the answer is C.", 4, "C", True, 0, 0, 1),
    ("a", 2, "A", False, 0, 1, 0),
    ("(A)", 2, "A", True, 0, 0, 1),
    ("E", 3, "A", False, 0, 0, 0),
    ("The answer is D because", 4, "D", True, 1, 0, 1),
    ("The answer is A. The answer is B.", 2, "A", True, 0, 0, 1),
    ("C: choice 2", 3, "C", False, 0, 0, 1),
    ("The correct answer is B", 2, "B", True, 0, 0, 1),
    ("choice 1", 3, "B", True, 0, 0, 1),
    ("A. or B.", 2, "A", True, 1, 1, 0),
]


def problems(folder: Path) -> None:
    """Write the published files; the choices of a problem are called "choice 0" and so on."""
    folder.mkdir()
    content = {
        str(number): {
            "question": f"Question {number}?",
            "choices": [f"choice {i}" for i in range(count)],
            "answer": "ABCDE".index(label),
            "hint": "A hint." if number % 2 else "",
            "image": "image.png" if has_image else None,
        }
        for number, (_, count, label, has_image, *_) in enumerate(CASES)
    }
    content["99"] = content["0"]  # of another split
    (folder / "problems.json").write_text(json.dumps(content))
    splits = {"train": ["99"], "test": [str(number) for number in range(len(CASES))]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))


def llava_questions(folder: Path) -> None:
    """Write the same questions as LLaVA does."""
    folder.mkdir()
    rows = []
    for number, (_, count, label, has_image, *_) in enumerate(CASES):
        listed = "\n".join(f"{'ABCDE'[i]}. choice {i}" for i in range(count))
        text = f"{'<image>' if has_image else ''}\nQuestion {number}?\n{listed}"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": label}]
        row = {"id": str(number), "conversations": turns}
        rows.append(row | ({"image": f"{number}/image.png"} if has_image else {}))
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("write", [problems, llava_questions])
@pytest.mark.parametrize(
    ("rule", "column", "scale"), [("official", 4, 100), ("lmms-eval", 5, 1), ("vlmevalkit", 6, 1)]
)
def test_every_rule_gives_the_expected_scores(
    tmp_path: Path, write, rule: str, column: int, scale: int
) -> None:
    write(tmp_path / "data")
    answers = tmp_path / "answers.jsonl"
    rows = [{"question_id": i, "prompt": "", "text": case[0]} for i, case in enumerate(CASES)]
    answers.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    right = [case[column] for case in CASES]
    with_image = [case[column] for case in CASES if case[3]]
    scores = score("scienceqa", answers, tmp_path / "data", rule)
    assert scores["splits"]["all"] == pytest.approx(
        {
            "accuracy": scale * sum(right) / 14,
            "image_accuracy": scale * sum(with_image) / len(with_image),
        }
    )
    assert (scores["items"], scores["images"]) == (14, 10)
    one = [score_of_one(tmp_path, row, rule) for row in rows]
    assert one == [scale * value for value in right]


def score_of_one(folder: Path, row: dict[str, object], rule: str) -> float:
    path = folder / "one.jsonl"
    path.write_text(json.dumps(row))
    found = score("scienceqa", path, folder / "data", rule, allow_subset=True)
    return found["splits"]["all"]["accuracy"]


def test_choices_of_several_lines_are_read(tmp_path: Path) -> None:
    choices = ["See you soon,\nJanet", "See You Soon,\nJim"]
    text = "Which is right?\n" + "\n".join(
        f"{letter}. {choice}" for letter, choice in zip("AB", choices, strict=True)
    )
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "B"}]
    (tmp_path / "llava_test_CQM-A.json").write_text(
        json.dumps([{"id": "1", "conversations": turns}])
    )
    (row,) = SCIENCEQA.read_tasks(tmp_path)["scienceqa"].rows
    assert [*row["choices"].values()] == choices
    # the first lines differ in case alone, so that the whole choice has to be compared
    answers = tmp_path / "a.jsonl"
    answers.write_text(json.dumps({"question_id": "1", "text": choices[1]}))
    splits = score("scienceqa", answers, tmp_path, "vlmevalkit")["splits"]
    assert splits["all"]["accuracy"] == 1.0


def test_the_version_depends_on_the_choices(tmp_path: Path) -> None:
    problems(tmp_path / "data")
    rows = SCIENCEQA.read_tasks(tmp_path / "data")["scienceqa"].rows
    before = rows_digest(rows, *SCIENCEQA.version_keys)
    rows[0]["choices"]["A"] = "another"
    assert rows_digest(rows, *SCIENCEQA.version_keys) != before
