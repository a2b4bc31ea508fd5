"""MMBench: letters as VLMEvalKit finds them, and questions right in every rotation."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.answer_letters import lmms_letter, vlmevalkit_letter
from realign.evaluation.answer_table import answer_table

ANIMALS = ["teddy bear", "rabbit", "cat", "dog"]
CHOICES = dict(zip("ABCD", ANIMALS, strict=True))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. rabbit", "B"),
        ("rabbit", "B"),
        ("The answer is B", "B"),
        ("I think it is B", "B"),
        ("b", "Z"),
        ("A cat is in the picture", "C"),
        ("It is a cat", "C"),
        ("Option D: dog", "D"),
        ("none of them", "Z"),
        ("Answer: C", "C"),
        ("C) cat", "C"),
        ("", "Z"),
        ("The correct answer is **B**. Here is why it is not the cat: ears.", "B"),
        ("a dog and a cat", "Z"),  # two choices
        ("I can't process this file. B", "Z"),
        ("Failed to obtain answer via API B", "Z"),  # no letter is read, but a choice is
        ("Failed to obtain answer via API: rabbit D", "B"),
        ("dog " * 40, "Z"),  # longer than twice all choices
    ],
)
def test_the_letter_of_an_answer_is_read(answer: str, letter: str) -> None:
    assert vlmevalkit_letter(answer, CHOICES) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. rabbit", "B"),
        ("rabbit", "B"),
        ("The answer is B", "B"),
        ("I think it is B", "B"),
        ("b", ""),
        ("A cat is in the picture", "C"),
        ("It is a cat", "C"),
        ("Option D: dog", "D"),
        ("none of them", ""),
        ("Answer: C", "C"),
        ("C) cat", "C"),
        ("", ""),
        ("E", "E"),  # a letter of no choice
        ("A is it, or not", "A"),  # the article is taken where nothing else is found
        ("A dog and a cat", "A"),  # two choices
        ("A or B", "A"),  # the first word before the last
        ("it is (A) or (B) here", "B"),  # the last of two that stand alike
        ("(A) is wrong, the answer is (C) here", "C"),
        ("Both of them", "B"),  # a capital letter within a word
        ("I choose one. Both (C) and (A)", "A"),  # the last after a statement
        ("Failed to obtain answer via API B", "B"),
        ("\ub2f5: Da", "D"),
    ],
)
def test_letters_are_read_as_by_lmms_eval(answer: str, letter: str) -> None:
    assert lmms_letter(answer, CHOICES) == letter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a table of two questions with their rotations; rabbit is right."""
    header = ["index", "question", "hint", *"ABCD", "answer", "category", "l2-category", "image"]
    lines = ["\t".join(header)]
    for index, kind in ((7, "attribute"), (8, "relation")):
        for turn in range(4):
            turned = ANIMALS[turn:] + ANIMALS[:turn]
            label = "ABCD"[turned.index("rabbit")]
            number = str(index + 1_000_000 * turn)
            row = [number, "Which?", "", *turned, label, kind, kind, f"{index}" + "x" * 200_000]
            lines.append("\t".join(row))
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("\n".join(lines))
    return tmp_path


def write_answers(path: Path, answers: dict[int, list[str]]) -> Path:
    rows = [
        {"question_id": index + 1_000_000 * turn, "round_id": 0, "prompt": "", "text": text}
        for index, texts in answers.items()
        for turn, text in enumerate(texts)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("texts", "is_whole"),
    [
        ("BADC", True),
        ("BADA", False),
        (["rabbit", "rabbit", "It is a rabbit.", "the rabbit"], True),
        ("BBBB", False),
        (["B", "A", "D", "hmm"], False),
    ],
)
def test_a_question_counts_only_if_right_in_every_rotation(
    data: Path, texts: list[str] | str, is_whole: bool
) -> None:
    path = write_answers(data / "a.jsonl", {7: [*texts], 8: [*"BADC"]})
    scores = score("mmbench", path, data)
    assert scores["splits"]["all"] == {
        "circular_accuracy": 100.0 if is_whole else 50.0,
        "accuracy": 100.0,
    }
    assert scores["splits"]["attribute"]["circular_accuracy"] == 100.0 * is_whole
    by_lmms = score("mmbench", path, data, "lmms-eval")
    assert by_lmms["splits"]["all"] == scores["splits"]["all"]
    assert score("mmbench", path, data, "vlmevalkit")["splits"]["relation"] == {
        "circular_accuracy": 1.0,
        "accuracy": 1.0,
    }
    assert scores["items"] == 8
    assert scores["images"] == 2


def test_the_upload_sheet_is_scored(data: Path) -> None:
    lines = ["index,question,prediction"]
    for index in (7, 8):
        lines += [f'{index + 1_000_000 * i},"Which, then?",{"BADC"[i]}' for i in range(4)]
    (data / "upload.csv").write_text("\n".join(lines))
    assert score("mmbench", data / "upload.csv", data)["splits"]["all"]["accuracy"] == 100.0
    (data / "upload.xlsx").touch()
    with pytest.raises(RefusedError, match=r"upload\.xlsx\. Save the sheet as tab-separated"):
        score("mmbench", data / "upload.xlsx", data)
    (data / "short.csv").write_text("index,prediction\n7\n")
    with pytest.raises(RefusedError, match=r"short\.csv, row 1 must have 2 columns.*got 1"):
        score("mmbench", data / "short.csv", data)


def test_a_table_without_answers_is_refused(data: Path) -> None:
    path = data / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tanswer\t", "\tsecret\t"))
    with pytest.raises(RefusedError, match="row 1 must have index, question and answer"):
        score("mmbench", data / "none.jsonl", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'index,prediction\n7,"B\n', "row 1 must be a row of a table"),
        (b"index,prediction,prediction\n7,A,B\n", "must have every column once"),
        (b"index,prediction\n7,\xff\n", "must be UTF-8"),
        (b"", "must have at least one row"),
    ],
)
def test_an_incomplete_sheet_is_refused(data: Path, content: bytes, message: str) -> None:
    (data / "upload.csv").write_bytes(content)
    with pytest.raises(RefusedError, match=message):
        score("mmbench", data / "upload.csv", data)


def test_a_sheet_with_windows_line_ends_and_a_bom_is_read(data: Path) -> None:
    letters = {7: "BADC", 8: "BADC"}
    lines = [
        f"{i + 1_000_000 * k},{a}" for i, choices in letters.items() for k, a in enumerate(choices)
    ]
    text = "\r\n".join(["\ufeffindex,prediction", *lines])
    (data / "upload.csv").write_bytes(text.encode())
    assert score("mmbench", data / "upload.csv", data)["splits"]["all"]["accuracy"] == 100.0


def test_category_names_are_printed_without_markup(data: Path) -> None:
    path = data / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("attribute", "[/red]"))
    answers = write_answers(data / "a.jsonl", {7: [*"BADC"], 8: [*"BADC"]})
    console = Console(file=StringIO(), width=120)
    console.print(answer_table(score("mmbench", answers, data)))
    assert "[/red]" in console.file.getvalue()


def test_a_category_named_all_does_not_replace_the_total(data: Path) -> None:
    path = data / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("attribute", "all"))
    answers = write_answers(data / "a.jsonl", {7: [*"BADC"], 8: [*"DDDD"]})
    splits = score("mmbench", answers, data)["splits"]
    assert [*splits] == ["all", "relation"]
    assert splits["all"]["accuracy"] == 50.0
