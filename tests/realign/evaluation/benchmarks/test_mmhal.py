"""MMHal-Bench against the values of the published script for the same replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.benchmarks.mmhal import TYPES, rating, strict_rating

REPLIES = [  # reply, what the published script finds
    ("It is fine.\nRating: 5, very informative, no hallucination", "5"),
    ("Rating: 3", "3"),
    ("rating: 0", "0"),
    ("Rating: 6 (or Rating: 5)", None),
    ("I would give 4 out of 6", None),
    ("Rating:5", None),
    ("Rating: 7", None),
    ("Rating: 3.5", "3"),
    ("", None),
]


@pytest.mark.parametrize(("reply", "found"), REPLIES)
def test_ratings_are_read_from_replies(reply: str, found: str | None) -> None:
    assert rating(reply) == found
    assert strict_rating(reply) == (None if reply == "Rating: 3.5" else found)


def test_a_rating_is_not_the_first_digit_of_a_longer_number() -> None:
    assert strict_rating("Rating: 10") is None
    assert strict_rating("Rating: 5.") == "5"


@pytest.fixture
def mmhal(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return the folder of data, the file of answers and that of the judge's responses."""
    rows: list[dict[str, Any]] = [
        {
            "question_type": TYPES[i % 8],
            "image_id": f"image{i}",
            "question": "Is it there?",
            "image_content": ["Cat"],
            "gt_answer": "It is.",
            "model_answer": "",
        }
        for i in range(96)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "response_template.json").write_text(json.dumps(rows))
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{**row, "model_answer": "Yes."} for row in rows]))
    replies = [reply for reply, _ in REPLIES] + ["Rating: 6"] * 87
    responses = tmp_path / "responses.json"
    responses.write_text(
        json.dumps(
            [
                {"model": "gpt-4-0314", "choices": [{"message": {"content": reply}}]}
                for reply in replies
            ]
        )
    )
    return tmp_path / "data", answers, responses


def test_the_official_rule_scores_a_full_file(mmhal: tuple[Path, Path, Path]) -> None:
    data, answers, responses = mmhal
    scores = score("mmhal", [answers, responses], data)
    splits = scores["splits"]
    assert splits["all"] == pytest.approx({"mean_score": 533 / 96, "hallucination_rate": 6 / 96})
    means = [round(splits[name]["mean_score"], 2) for name in TYPES]
    assert means == [5.42, 5.75, 5.5, 5.5, 5.5, 5.5, 5.5, 5.75]
    assert scores["judging"]["unparsed"] == {
        "items": 5,
        "ids": ["image3", "image4", "image5", "image6", "image8"],
    }
    assert scores["unjudged"] == {"items": 0, "ids": []}
    assert scores["judging"]["judges"] == [
        {"model": "gpt-4-0314", "prompt": None, "prompt_sha256": None, "replies": 96}
    ]
    assert score("mmhal", responses, data) == scores  # the answers themselves are not scored


def test_the_strict_rule_gives_bounds_instead_of_a_score(
    mmhal: tuple[Path, Path, Path],
) -> None:
    data, _, responses = mmhal
    scores = score("mmhal", responses, data, "strict", bootstrap=10)
    assert {value for found in scores["splits"].values() for value in found.values()} == {None}
    assert scores["intervals"] is None
    assert scores["unjudged"]["ids"] == [f"image{i}" for i in (3, 4, 5, 6, 7, 8)]
    bounds = scores["bounds"]["all"]
    assert bounds["mean_score"] == pytest.approx([530 / 96, (530 + 6 * 6) / 96])
    assert bounds["hallucination_rate"] == pytest.approx([1 / 96, 7 / 96])
    assert scores["bounds"]["adversarial"]["mean_score"] == [5.75, 5.75]


def test_responses_of_another_number_of_questions_are_refused(
    mmhal: tuple[Path, Path, Path],
) -> None:
    data, _, responses = mmhal
    responses.write_text(json.dumps(json.loads(responses.read_text())[:95]))
    with pytest.raises(RefusedError, match="95 answers are to no question of the data"):
        score("mmhal", responses, data, allow_subset=True)


def test_judge_replies_stored_with_the_answers_are_scored(mmhal: tuple[Path, Path, Path]) -> None:
    data, answers, _ = mmhal
    rows = json.loads(answers.read_text())
    for field, reply in (("gpt4_review", "Rating: 4"), ("judge_reply", "Rating: 4")):
        answers.write_text(json.dumps([{**row, field: reply} for row in rows[::-1]]))
        assert score("mmhal", answers, data)["splits"]["all"]["mean_score"] == 4.0
