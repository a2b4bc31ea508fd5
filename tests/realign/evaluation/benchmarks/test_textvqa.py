"""TextVQA and VizWiz against the values of the published scorers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.vqa_answers import official_form, soft_accuracy, vlmevalkit_form

NOKIA = ["nokia"] * 6 + ["Nokia phone"] * 2 + ["unanswerable", "the nokia"]
CASES = [  # answer, references, official and lmms-eval, VLMEvalKit
    ("nokia", NOKIA, 1.0, 1.0),
    ("Nokia.", NOKIA, 1.0, 1.0),
    ("nokia phone", NOKIA, 0.6, 0.6),
    ("unanswerable", NOKIA, 0.3, 0.3),
    ("samsung", NOKIA, 0.0, 0.0),
    ("1,000", ["1,000"] * 5 + ["1000"] * 5, 1.0, 1.0),
    ("three", ["3"] * 4 + ["three"] * 6, 1.0, 1.0),
    ("dont", ["don't"] * 3 + ["do not"] * 7, 0.9, 0.9),
    ("5.0", ["5.0"] * 3 + ["5"] * 7, 0.9, 0.9),
    ("yes", ["yes"] * 2 + ["no"] * 8, 0.6, 0.6),
    ("", [""] * 2 + ["x"] * 8, 0.6, 0.6),
    ("a", ["a"] * 10, 1.0, 1.0),
    ("22.", ["22"] * 10, 1.0, 0.0),
    ("red,blue", ["red, blue"] * 10, 0.0, 1.0),
    ("red,blue", ["red blue"] * 5 + ["redblue"] * 5, 1.0, 1.0),
    ("No. 7.", ["no 7"] * 10, 1.0, 0.0),
    ("12:30 p.m.", ["12:30 pm"] * 10, 1.0, 1.0),
]


@pytest.mark.parametrize(("answer", "references", "official", "vlmevalkit"), CASES)
def test_soft_accuracy_equals_published_values(
    answer: str, references: list[str], official: float, vlmevalkit: float
) -> None:
    for form, wanted in ((official_form, official), (vlmevalkit_form, vlmevalkit)):
        found = soft_accuracy(form(answer), [form(reference) for reference in references])
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Unanswerable", "unanswerable"),
        ("A Coca-Cola bottle.", "coca cola bottle"),
        ("It is a $20 bill!", "it is $20 bill"),
        ("Two dollars", "2 dollars"),
        ("Campbell's soup, tomato", "campbell 's soup tomato"),
        ("The  red\ncan", "red can"),
        ("10%", "10%"),
        ("5:30", "5:30"),
        ("wouldnt've", "wouldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
    ],
)
def test_answers_are_normalised_as_by_the_official_rule(answer: str, form: str) -> None:
    assert official_form(answer) == form


def test_vlmevalkit_normalization_keeps_a_possessive() -> None:
    assert vlmevalkit_form("Campbell's soup, tomato") == "campbell's soup tomato"


def textvqa(folder: Path) -> None:
    """Write the published form of the questions; one image has two."""
    rows = [
        {
            "question_id": 34602 + i,
            "image_id": f"image{i // 2}",
            "question": f"What is Written {i}?",
            "answers": references,
        }
        for i, (_, references, *_) in enumerate(CASES)
    ]
    folder.mkdir()
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("official", 100 * sum(case[2] for case in CASES) / len(CASES)),
        ("lmms-eval", sum(case[2] for case in CASES) / len(CASES)),
        ("vlmevalkit", 100 * sum(case[3] for case in CASES) / len(CASES)),
    ],
)
@pytest.mark.parametrize("has_tokens", [True, False])
def test_llava_answers_are_read_with_and_without_ocr_tokens(
    tmp_path: Path, rule: str, wanted: float, has_tokens: bool
) -> None:
    textvqa(tmp_path / "data")
    tokens = "Reference OCR token: NOKIA, 5\n" if has_tokens else ""
    rows = [
        {
            "question_id": f"image{i // 2}",
            "prompt": f"What is written {i}?\n{tokens}Answer the question using a single word.",
            "text": answer,
        }
        for i, (answer, *_) in enumerate(CASES)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    scores = score("textvqa", path, tmp_path / "data", rule)
    assert scores["splits"]["all"]["accuracy"] == pytest.approx(wanted)
    assert (scores["items"], scores["images"]) == (17, 9)
    upload = [{"question_id": 34602 + i, "answer": row["text"]} for i, row in enumerate(rows)]
    (tmp_path / "upload.json").write_text(json.dumps(upload))
    assert score("textvqa", tmp_path / "upload.json", tmp_path / "data", rule) == scores


def test_questions_without_ten_answers_are_refused(tmp_path: Path) -> None:
    row = {"image_id": "a", "question": "x?", "answers": ["x"] * 9}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [row]}))
    with pytest.raises(RefusedError, match="question 1: answers must be a list of 10 answers"):
        score("textvqa", tmp_path / "none.json", tmp_path)


def test_vizwiz_scores_are_split_by_answer_type(tmp_path: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{i}.jpg",
            "question": "What is this?",
            "answers": [{"answer": text, "answer_confidence": "yes"} for text in references],
            "answer_type": "number" if i == 1 else "other",
        }
        for i, references in enumerate([NOKIA, ["22"] * 10])
    ]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    upload = [
        {"image": "VizWiz_val_1.jpg", "answer": "22."},
        {"image": "VizWiz_val_0.jpg", "answer": "nokia phone"},
    ]
    (tmp_path / "upload.json").write_text(json.dumps(upload))
    splits = score("vizwiz", tmp_path / "upload.json", tmp_path)["splits"]
    found = {name: values["accuracy"] for name, values in splits.items()}
    assert found == pytest.approx({"all": 80.0, "number": 100.0, "other": 60.0})
