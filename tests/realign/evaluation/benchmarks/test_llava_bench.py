"""LLaVA-Bench against the values of the published programs for the same reviews."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.benchmarks.llava_bench import (
    first_numbers,
    official_scores,
    rounded_metrics,
    strict_scores,
)

REVIEWS = [  # reply, by official, by lmms-eval
    ("8 9", "8.0 9.0", "8.0 9.0"),
    ("8, 9", None, "8.0 9.0"),
    ("8,9", "8.0 9.0", "8.0 9.0"),
    ("8.5 9\nBoth are good.", "8.5 9.0", "8.5 9.0"),
    ("Assistant 1: 8, Assistant 2: 9", None, "1.0 8.0"),
    ("8 9 ", None, "8.0 9.0"),
    ("8/10 9/10", None, "8.0 10.0"),
    ("Score: 7 6", None, "7.0 6.0"),
    ("", None, None),
    ("nan 5", None, None),
    ("-1 -1", None, None),
]


@pytest.mark.parametrize(("reply", "official", "lmms"), REVIEWS)
def test_scores_are_read_from_the_first_line(
    reply: str, official: str | None, lmms: str | None
) -> None:
    assert official_scores(reply) == strict_scores(reply) == official
    assert first_numbers(reply) == lmms


def test_the_strict_rule_refuses_scores_off_the_scale() -> None:
    assert (official_scores("0 11"), strict_scores("0 11")) == ("0.0 11.0", None)


def test_halves_are_rounded_to_even_as_in_python() -> None:
    # numpy rounds ten times the value, and makes 64.6 of 64.65, which is a little more than that
    for model in range(5000, 5200):
        sums = np.array([1000.0, 8000.0, model])
        wanted = round(round(model / 1000, 3) / 8.0 * 100, 1)
        assert rounded_metrics(sums)["relative_score"] == wanted


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with three questions."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text(
        "".join(
            json.dumps({"question_id": i, "image": "1.jpg", "text": "Q?", "category": category})
            + "\n"
            for i, category in enumerate(("conv", "detail", "complex"))
        )
    )
    return tmp_path / "data"


def reviews(path: Path, replies: list[str], **more: Any) -> Path:
    """Write a published file of reviews."""
    lines = [
        {
            "question_id": i,
            "category": "llava_bench_conv",
            "content": reply,
            "tuple": [0, 0],
            **more,
        }
        for i, reply in enumerate(replies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_official_rule_averages_failed_reviews_too(tmp_path: Path, data: Path) -> None:
    path = reviews(tmp_path / "r.jsonl", ["8 9", "6 6", "not two scores"])
    scores = score("llava-bench", path, data)
    assert scores["splits"]["all"]["relative_score"] == 107.7
    assert scores["splits"]["conv"]["relative_score"] == 112.5
    assert scores["splits"]["complex"]["relative_score"] == 100.0  # -1 of -1
    assert scores["judging"]["unparsed"] == {"items": 1, "ids": ["2"]}
    exact = score("llava-bench", path, data, "vlmevalkit")["splits"]["all"]["relative_score"]
    assert exact == pytest.approx(100 * 14 / 13)
    strict = score("llava-bench", path, data, "strict")
    assert strict["splits"]["all"]["relative_score"] is None
    # 15 + 1 of 14 + 10, and 15 + 10 of 14 + 1
    assert strict["bounds"]["all"]["relative_score"] == [66.7, 166.7]
    right = reviews(tmp_path / "s.jsonl", ["8 9", "6 6"])
    part = score("llava-bench", right, data, allow_subset=True)
    assert part["splits"]["all"]["relative_score"] == 107.1


def test_several_grading_files_are_scored_together(tmp_path: Path, data: Path) -> None:
    files = [
        reviews(tmp_path / f"{k}.jsonl", ["8 9", "6 6", f"5 {4 + k}"], answer2_id="a")
        for k in range(3)
    ]
    scores = score("llava-bench", files, data)
    runs = [run["splits"]["all"]["relative_score"] for run in scores["judging"]["gradings"]]
    assert runs == [100.0, 105.3, 110.5]
    assert scores["splits"]["all"]["relative_score"] == pytest.approx(sum(runs) / 3)
    lines = files[2].read_text().splitlines()
    files[2].write_text("\n".join(lines[:2]))
    fewer = score("llava-bench", files, data)
    with pytest.raises(RefusedError, match=r"must be files named once, got .*0\.jsonl twice"):
        score("llava-bench", [files[0], *files], data)
    assert fewer["unjudged"] == {"items": 1, "ids": ["2"]}
    assert fewer["judging"]["gradings"][0]["splits"]["all"]["relative_score"] == 100.0
    files[0].write_text("\n".join(lines[:2]))
    unjudged = [run["unjudged"] for run in score("llava-bench", files, data)["judging"]["gradings"]]
    assert unjudged == [["2"], [], ["2"]]  # a gap stays in the grading that has it
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(f'{{"id": {i}, "answer": "x"}}\n' for i in range(3)))
    again = tmp_path / "b.jsonl"
    again.write_text(answers.read_text())
    with pytest.raises(RefusedError, match="3 answers are to a question again"):
        score("llava-bench", [answers, again], data)


def test_gradings_of_other_answers_are_refused(tmp_path: Path, data: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_text(
            "".join(
                json.dumps({"id": i, "answer": f"{path.name} {i}", "judge_reply": "8 9"}) + "\n"
                for i in range(3)
            )
        )
    with pytest.raises(RefusedError, match=r"3 answers are to a question again, first b\.jsonl"):
        score("llava-bench", files, data)
    files[1].write_text(files[0].read_text().replace("8 9", "9 9"))
    runs = score("llava-bench", files, data)["judging"]["gradings"]
    assert [run["splits"]["all"]["relative_score"] for run in runs] == [112.5, 100.0]


def test_a_review_without_its_text_keeps_its_two_scores(tmp_path: Path, data: Path) -> None:
    path = reviews(tmp_path / "r.jsonl", ["", "", ""], content=None, tuple=[8.0, 9.0])
    assert score("llava-bench", path, data)["splits"]["all"]["relative_score"] == 112.5
    reviews(path, ["", "", ""], content=None, tuple=[-1, -1])
    assert score("llava-bench", path, data, "strict")["unjudged"]["items"] == 3
