"""Answers that no judge has read, or about which a reply holds no verdict, and several gradings."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.answer_table import answer_table
from realign.evaluation.benchmarks.hallusionbench import strict_verdict


@pytest.fixture
def hallusionbench(tmp_path: Path) -> list[dict[str, Any]]:
    """Write four questions about one figure, and return them."""
    rows = [
        {
            "category": "VD",
            "subcategory": "math",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": "0",
            "question_id": str(i),
            "question": f"Is it {i}?",
            "gt_answer": "1",
            "filename": "a.png",
        }
        for i in range(4)
    ]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    return rows


def judged(path: Path, rows: list[dict[str, Any]], *replies: Any) -> Path:
    """Write answers with the replies of a judge, or without one where it is an ellipsis."""
    records = [
        {"id": "_".join(("VD_math_0_0", row["question_id"])), "answer": "Yes."}
        | ({} if reply is ... else {"judge_reply": reply})
        for row, reply in zip(rows, replies, strict=True)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("missing", [None, ...])
@pytest.mark.parametrize("rule", ["official", "strict", "lmms-eval"])
def test_a_missing_reply_withholds_every_score(
    tmp_path: Path, hallusionbench: list[dict[str, Any]], missing: Any, rule: str
) -> None:
    replies = ["correct", "incorrect", missing, "correct"]
    path = judged(tmp_path / "a.jsonl", hallusionbench, *replies)
    scores = score("hallusionbench", path, tmp_path, rule, bootstrap=10)
    assert {value for found in scores["splits"].values() for value in found.values()} == {None}
    assert scores["unjudged"] == {"items": 1, "ids": ["VD_math_0_0_2"]}
    assert scores["bounds"]["all"]["aacc"] == [50.0, 75.0]
    assert scores["bounds"]["all"]["facc"] == [0.0, 0.0]  # one answer is wrong in any case
    assert (scores["intervals"], scores["baselines"]) == (None, {})
    json.dumps(scores, allow_nan=False)


def test_the_official_rule_scores_and_lists_unparsed_replies(
    tmp_path: Path, hallusionbench: list[dict[str, Any]]
) -> None:
    path = judged(tmp_path / "a.jsonl", hallusionbench, "correct", "Yes", "unclear", "not correct")
    scores = score("hallusionbench", path, tmp_path)
    assert scores["splits"]["all"]["aacc"] == 50.0
    assert scores["judging"]["unparsed"] == {"items": 1, "ids": ["VD_math_0_0_1"]}
    assert scores["unjudged"]["items"] == 0
    strict = score("hallusionbench", path, tmp_path, "strict")
    assert strict["unjudged"]["ids"] == ["VD_math_0_0_1", "VD_math_0_0_3"]
    assert strict["bounds"]["all"]["aacc"] == [25.0, 75.0]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Correct.", "1"),
        ("“incorrect”", "0"),
        ("It is unclear", "2"),
        ("It is not correct.", None),
        ("That isn't entirely correct", None),
        ("correct or incorrect", None),
        ("incorrectly", None),
        ("", None),
    ],
)
def test_strict_verdicts_are_read_from_replies(reply: str, verdict: str | None) -> None:
    assert strict_verdict(reply) == verdict


def test_the_table_shows_bounds_and_names_the_unjudged(
    tmp_path: Path, hallusionbench: list[dict[str, Any]]
) -> None:
    path = judged(tmp_path / "a.jsonl", hallusionbench, "correct", None, "Yes", "correct")
    text = shown(score("hallusionbench", path, tmp_path))
    assert "bounds" in text
    assert "50.0-75.0" in text
    assert "Unjudged: 1 answers (VD_math_0_0_1). Values are withheld" in text
    assert "Replies without a verdict, scored all the same: 1 answers (VD_math_0_0_2)." in text
    assert "Judge: not stated in the files; prompt: not stated in the files; 3 replies." in text


def test_the_table_shows_every_grading_and_its_judge(
    tmp_path: Path, hallusionbench: list[dict[str, Any]]
) -> None:
    about = {"model": "m", "prompt": "realign hallusionbench 1", "prompt_sha256": "ab" * 32}
    path = judged(tmp_path / "a.jsonl", hallusionbench, *[["correct", "incorrect"]] * 4)
    records = [json.loads(line) | {"judge": about} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = shown(score("hallusionbench", path, tmp_path))
    assert "Gradings of all, aacc: 100.00, 0.00; standard deviation 70.71" in text
    assert "0.0-100.0" in text
    assert f"Judge: m; prompt: realign hallusionbench 1 (sha256 {'ab' * 8}); 8 replies." in text


def shown(scores: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(answer_table(scores))
    assert isinstance(console.file, StringIO)
    return " ".join(console.file.getvalue().split())


def mmbench(tmp_path: Path, *replies: Any) -> Path:
    """Write a question in two rotations, and an answer to the second that has no letter."""
    header = "index\tquestion\tA\tB\tanswer\n"
    rows = "1\tWhat is it?\tcat\tdog\tA\n1000001\tWhat is it?\tdog\tcat\tB\n"
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(header + rows)
    answers = tmp_path / "answers.jsonl"
    second = {"id": 1000001, "answer": "Some small animal.", "judge_reply": list(replies)}
    answers.write_text('{"id": 1, "answer": "A"}\n' + json.dumps(second))
    return answers


@pytest.mark.parametrize(
    ("reply", "accuracy"), [("B", 100.0), ("A", 0.0), ("Z", 0.0), ("cat", 100.0)]
)
def test_the_judge_decides_the_choice_of_an_answer_without_a_letter(
    tmp_path: Path, reply: str, accuracy: float
) -> None:
    answers = mmbench(tmp_path, reply)
    scores = score("mmbench", answers, tmp_path, "judged")
    assert scores["splits"]["all"]["circular_accuracy"] == accuracy
    assert scores["baselines"]["A"]["all"]["accuracy"] == 100.0
    assert score("mmbench", answers, tmp_path)["splits"]["all"]["circular_accuracy"] == 0.0


def test_answers_without_a_choice_by_the_judge_stay_unjudged(tmp_path: Path) -> None:
    answers = mmbench(tmp_path, "I cannot say.")
    scores = score("mmbench", answers, tmp_path, "judged")
    assert scores["unjudged"]["ids"] == ["1000001"]
    assert scores["bounds"]["all"]["circular_accuracy"] == [0.0, 100.0]
    answers.write_text('{"id": 1, "answer": "A"}\n{"id": 1000001, "answer": "Both"}\n')
    with pytest.raises(RefusedError, match=r"about 1 answers.* question 1000001.*--rule official"):
        score("mmbench", answers, tmp_path, "judged")
    answers.write_text('{"id": 1, "answer": "A"}\n{"id": 1000001, "answer": "A"}\n')
    assert score("mmbench", answers, tmp_path, "judged")["unjudged"]["items"] == 0
