"""MME against the published evaluation tool's values."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.answer_table import answer_table
from realign.evaluation.answer_words import yes_or_no
from realign.evaluation.benchmarks.mme import MME, PERCEPTION, lmms_word, official_word

YES, NO, OTHER = True, False, None
WHOLE = [  # image, label, answer
    ("1", "Yes", "Yes"),
    ("1", "No", "No"),
    ("2", "Yes", "yes it is"),
    ("2", "No", "Yes"),
    ("3", "Yes", "Unknown"),
    ("3", "No", "no."),
    ("4", "Yes", "No"),
    ("4", "No", "Yes"),
]


@pytest.mark.parametrize(
    ("answer", "official", "lmms", "vlmevalkit"),
    [
        ("Yes", YES, YES, YES),
        ("No.", NO, NO, NO),
        ("no, it is not", NO, NO, NO),
        ("Y", OTHER, YES, OTHER),
        ("n", OTHER, NO, OTHER),
        ("Not sure", NO, NO, OTHER),
        ("None of these", NO, NO, OTHER),
        ("The answer is yes", OTHER, OTHER, YES),
        ("Unknown", OTHER, OTHER, OTHER),
        ("nope", NO, NO, OTHER),
        ("yes and no", YES, YES, OTHER),
        ("I think no", OTHER, OTHER, NO),
        ("Now it is red", NO, NO, OTHER),
        ("", OTHER, OTHER, OTHER),
    ],
)
def test_each_rule_reads_answers_by_its_own_parser(
    answer: str, official: bool | None, lmms: bool | None, vlmevalkit: bool | None
) -> None:
    assert official_word(answer) is official
    assert lmms_word(answer) is lmms
    assert yes_or_no(answer) is vlmevalkit


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder in the layout of the evaluation tool, with one task."""
    folder = tmp_path / "tool"
    folder.mkdir()
    lines = [
        f"{image}.jpg\tIs it {label}? Please answer yes or no.\t{label}"
        for image, label, _ in WHOLE
    ]
    (folder / "color.txt").write_text("\n".join(lines))
    return folder


def llava_answers(path: Path) -> Path:
    rows = [
        {
            "question_id": f"color/{image}.jpg",
            "prompt": f"Is it  {label}?\nAnswer the question using a single word or phrase.",
            "text": answer,
        }
        for image, label, answer in WHOLE
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)))
    return path


@pytest.mark.parametrize("rule", ["official", "lmms-eval", "vlmevalkit"])
def test_the_scores_of_a_task_equal_counts_by_hand(data: Path, tmp_path: Path, rule: str) -> None:
    scores = score("mme", llava_answers(tmp_path / "a.jsonl"), data, rule)
    assert scores["splits"]["color"] == {"acc": 50.0, "acc_plus": 25.0, "score": 75.0}
    assert scores["splits"]["perception"] == {"score": None}  # nine of its tasks are missing
    assert (scores["unit"], scores["items"], scores["images"]) == ("points", 8, 4)
    # one of the two answers about each image is right, since both are the same
    assert scores["baselines"]["yes"]["color"] == {"acc": 50.0, "acc_plus": 0.0, "score": 50.0}


def test_the_answer_folder_of_the_official_tool_is_read(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    lines = [
        f"{line}\t{answer}"
        for line, (*_, answer) in zip(
            (data / "color.txt").read_text().splitlines(), WHOLE, strict=True
        )
    ]
    (results / "color.txt").write_text("\n".join(lines))
    from_tool = score("mme", results, data)

    images = tmp_path / "mme" / "color"
    (images / "questions_answers_YN").mkdir(parents=True)
    (images / "images").mkdir()
    for number in "1234":
        (images / "images" / f"{number}.jpg").touch()
        text = "\n".join(
            f"Is it {label}? Please answer yes or no.\t{label}"
            for image, label, _ in WHOLE
            if image == number
        )
        (images / "questions_answers_YN" / f"{number}.txt").write_text(text)
    from_folders = score("mme", results, tmp_path / "mme")
    assert from_tool == from_folders
    assert from_tool["splits"]["color"]["score"] == 75.0

    (results / "color.txt").write_text("\n".join([*lines[:-1], lines[-1] + "\tmore"]))
    with pytest.raises(RefusedError, match=r"color\.txt, line 8 must have four columns.*no tab"):
        score("mme", results, data)


def test_perception_is_the_sum_of_all_its_tasks(data: Path, tmp_path: Path) -> None:
    others = [task for task in (*PERCEPTION, "code_reasoning") if task != "color"]
    for task in others:
        (data / f"{task}.txt").write_text("9.jpg\tOne?\tYes\n9.jpg\tTwo?\tNo")
    answers = llava_answers(tmp_path / "a.jsonl")
    with answers.open("a") as file:
        for task in others:
            for question, text in (("One?", "Yes"), ("Two?", "No")):
                row = {"question_id": f"{task}/9.jpg", "prompt": question, "text": text}
                file.write(f"{json.dumps(row)}\n")
    splits = score("mme", answers, data)["splits"]
    assert splits["perception"] == {"score": 1875.0}
    assert splits["code_reasoning"]["score"] == 200.0
    assert splits["cognition"] == {"score": None}  # three of its tasks are missing


def test_data_without_pairs_is_refused(data: Path, tmp_path: Path) -> None:
    text = (data / "color.txt").read_text()
    (data / "color.txt").write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(RefusedError, match=r"two questions for each image, got 1 for color/4\.jpg"):
        score("mme", llava_answers(tmp_path / "a.jsonl"), data)


def test_an_answer_may_hold_any_character_but_a_tab_and_a_line_break(
    data: Path, tmp_path: Path
) -> None:
    lines = (data / "color.txt").read_text().splitlines()
    replies = ["No\u2028\x0b\x85 it is not", *(answer for *_, answer in WHOLE[1:])]
    answers = tmp_path / "color.txt"
    rows = [f"{line}\t{answer}" for line, answer in zip(lines, replies, strict=True)]
    answers.write_text("\n".join(rows), encoding="utf-8")
    assert score("mme", answers, data)["splits"]["color"]["acc"] == 37.5  # one fewer is right


@pytest.mark.parametrize("name", ["missing.txt", "color.txt"])
def test_a_list_that_is_missing_or_empty_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "color.txt").write_text("\n")
    with pytest.raises(RefusedError, match=name):
        score("mme", tmp_path / name, data)


@pytest.mark.parametrize("value", ["", "/", None, 3])
def test_a_question_id_without_a_task_is_refused(data: Path, tmp_path: Path, value: object) -> None:
    path = llava_answers(tmp_path / "a.jsonl")
    first, *others = path.read_text().splitlines()
    changed = json.dumps(json.loads(first) | {"question_id": value})
    path.write_text("\n".join([changed, *others]))
    with pytest.raises(RefusedError, match=r"to no question of the data, first a\.jsonl, line 1"):
        score("mme", path, data)


def test_the_table_has_a_row_per_task_with_untruncated_numbers(data: Path, tmp_path: Path) -> None:
    for task in PERCEPTION[:4]:
        (data / f"{task}.txt").write_text((data / "color.txt").read_text())
    answers = tmp_path / "a.json"
    rows = [
        {"task": task, "image": image, "question": f"Is it {label}?", "answer": answer}
        for task in PERCEPTION[:4]
        for image, label, answer in WHOLE
    ]
    answers.write_text(json.dumps(rows))
    console = Console(file=StringIO(), width=60)
    console.print(answer_table(score("mme", answers, data, bootstrap=10)))
    printed = console.file.getvalue()
    assert "…" not in printed
    cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    assert table["count"] == ["75.00", "50.00", "25.00"]
    assert table["perception"] == ["—", "—", "—"]


def test_the_llava_prompt_strips_the_space_after_the_question() -> None:
    row = {"text": "Is there a red bus?  Please answer yes or no."}  # as published, with two spaces
    suffix = "\nAnswer the question using a single word or phrase."
    assert MME.prompts["llava"].text(row) == f"Is there a red bus?{suffix}"
    assert MME.prompts["lmms-eval"].text(row) == f"Is there a red bus? {suffix}"
