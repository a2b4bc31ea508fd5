"""MM-Vet against the values of the published programs for the same replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realign.errors import RefusedError
from realign.evaluation import score


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with four questions."""
    kinds = [["ocr", "math"], ["rec"], ["rec"], ["spat", "rec", "ocr"]]
    questions = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.png",
            "question": f"What is {i}?",
            "answer": "-1<AND>-5",
            "capability": kind,
        }
        for i, kind in enumerate(kinds)
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mm-vet.json").write_text(json.dumps(questions, indent=4))
    return tmp_path / "data"


def grades(path: Path, *runs: list[str], scores: list[float] | None = None) -> Path:
    """Write a published grade file with the contents of each run."""
    content: dict[str, Any] = {}
    for i, replies in enumerate(zip(*runs, strict=True)):
        read = scores or [float(reply) for reply in replies]
        content[f"v1_{i}"] = {"model": ["gpt-4"] * len(runs), "content": replies, "score": read}
    path.write_text(json.dumps(content, indent=4))
    return path


def test_scores_are_given_per_capability_and_combination(tmp_path: Path, data: Path) -> None:
    path = grades(tmp_path / "g.json", ["0.5", "1.0", "0.0", "0.2"])
    splits = score("mm-vet", path, data)["splits"]
    assert {name: found["score"] for name, found in splits.items()} == pytest.approx(
        {"all": 42.5, "ocr": 35.0, "math": 50.0, "rec": 40.0, "spat": 20.0}
        | {"ocr+math": 50.0, "rec only": 50.0, "rec+ocr+spat": 20.0}
    )


def test_several_gradings_give_a_mean_and_a_spread(tmp_path: Path, data: Path) -> None:
    runs = [["0.5", "1.0", "0.0", "0.2"], ["0.5", "1.0", "0.0", "0.0"], ["0.5", "0.9", "0.1", "1"]]
    scores = score("mm-vet", grades(tmp_path / "g.json", *runs), data, bootstrap=200)
    assert scores["splits"]["all"]["score"] == pytest.approx((42.5 + 37.5 + 62.5) / 3)
    of_runs = [run["splits"]["all"]["score"] for run in scores["judging"]["gradings"]]
    assert of_runs == pytest.approx([42.5, 37.5, 62.5])
    spread = scores["judging"]["spread"]["all"]["score"]
    # of 42.5, 37.5 and 62.5, whose mean is 47.5: (25 + 100 + 225) / 2 = 175
    assert spread == pytest.approx({"min": 37.5, "max": 62.5, "sd": 175**0.5})
    low, high = scores["intervals"]["all"]["score"]
    assert low < scores["splits"]["all"]["score"] < high
    assert scores["judging"]["judges"][0]["model"] == "gpt-4"
    assert scores["judging"]["judges"][0]["replies"] == 12


REPLIES = [  # reply; by official, lmms-eval and vlmevalkit; None where there is no verdict
    ("0.5", 0.5, 0.5, 0.5),
    ("1", 1.0, 1.0, 1.0),
    ("0.5 because", 0.5, 0.5, None),
    ("0,5", None, None, None),
    ("Correctness: 0.8", None, None, None),
    ("1.2", None, None, None),
    ("5", None, None, None),
    ("0.0\n", 0.0, 0.0, 0.0),
    ("nan", None, None, None),
    (" 0.5", None, 0.5, 0.5),
]


@pytest.mark.parametrize(("reply", "official", "lmms", "vlmevalkit"), REPLIES)
def test_every_rule_reads_the_judge_replies(
    tmp_path: Path,
    data: Path,
    reply: str,
    official: float | None,
    lmms: float | None,
    vlmevalkit: float | None,
) -> None:
    path = grades(tmp_path / "g.json", [reply, "1", "1", "1"], scores=[0.0])
    for rule, found in (("official", official), ("lmms-eval", lmms), ("vlmevalkit", vlmevalkit)):
        scores = score("mm-vet", path, data, rule)
        if rule == "lmms-eval" and reply in ("1.2", "5", "nan"):  # it would ask without end
            assert scores["unjudged"]["ids"] == ["v1_0"]
            assert scores["bounds"]["all"]["score"] == [75.0, 100.0]
            continue
        assert scores["splits"]["all"]["score"] == pytest.approx(100 * ((found or 0) + 3) / 4)
        assert scores["judging"]["unparsed"]["items"] == (found is None)
    strict = score("mm-vet", path, data, "strict")
    assert strict["unjudged"]["items"] == (official is None)


def test_published_answers_are_read_with_grades_from_another_file(
    tmp_path: Path, data: Path
) -> None:
    grade = grades(tmp_path / "g.json", ["0.5", "1.0", "0.0", "0.2"])
    by_id = tmp_path / "by_id.json"
    by_id.write_text(json.dumps({f"v1_{i}": "It is." for i in range(4)}, indent=2))
    lines = tmp_path / "llava.jsonl"
    lines.write_text("".join(f'{{"question_id": {i}, "text": "It is."}}\n' for i in range(4)))
    wanted = score("mm-vet", grade, data)
    assert score("mm-vet", [by_id, grade], data) == wanted
    assert score("mm-vet", [grade, lines], data) == wanted
    with pytest.raises(RefusedError, match="4 answers are to a question again"):
        score("mm-vet", [lines, by_id, grade], data)
    with pytest.raises(RefusedError, match="requires the replies of a judge about 4 answers"):
        score("mm-vet", by_id, data)


def test_an_unfinished_grading_leaves_answers_unjudged(tmp_path: Path, data: Path) -> None:
    path = grades(tmp_path / "g.json", ["0.5", "1", "0", "0.2"], ["0.5", "1", "0", "0.2"])
    content = json.loads(path.read_text())
    content["v1_3"] = {name: values[:1] for name, values in content["v1_3"].items()}
    path.write_text(json.dumps(content))
    scores = score("mm-vet", path, data)
    assert scores["unjudged"] == {"items": 1, "ids": ["v1_3"]}
    first, second = scores["judging"]["gradings"]
    assert first["splits"]["all"]["score"] == pytest.approx(42.5)
    assert (second["splits"]["all"]["score"], second["unjudged"]) == (None, ["v1_3"])
    assert scores["splits"]["all"]["score"] is None
    # the mean of 42.5 and of what the second can be: 37.5 to 62.5
    assert scores["bounds"]["all"]["score"] == pytest.approx([40.0, 52.5])


def test_llava_question_ids_give_only_the_total_score(tmp_path: Path) -> None:
    (tmp_path / "llava-mm-vet.jsonl").write_text(
        "".join(
            json.dumps({"image": f"v1_{i}.png", "text": "Q?", "category": "conv", "question_id": i})
            + "\n"
            for i in range(2)
        )
    )
    scores = score("mm-vet", grades(tmp_path / "g.json", ["0.5", "0.0"]), tmp_path)
    assert scores["splits"] == {"all": {"score": 25.0}}
