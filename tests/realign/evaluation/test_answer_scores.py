"""Scores of answer files against values that the published programs gave for the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.evaluation import score
from realign.evaluation.benchmarks.amber import official_metrics
from realign.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.rows import rows_digest

POPE_CASES = [  # answer, label
    ("Yes", "yes"),
    ("Yes.", "yes"),
    ("yes, there is a dog in the image.", "yes"),
    ("There is a dog.", "yes"),
    ("No", "no"),
    ("No, there is no dog.", "no"),
    ("There isn't a dog in the image.", "no"),
    ("NO", "no"),
    ("Not visible.", "no"),
    ("I cannot see a dog.", "no"),
    ("Yes. There is no cat, though.", "yes"),
    ("It is not clear, but yes", "yes"),
    ("", "no"),
    ("There is no dog", "yes"),
    ("nope", "no"),
    ("Yes", "no"),
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def pope_data(folder: Path, labels: list[str], split: str = "random") -> list[dict[str, Any]]:
    rows = [
        {
            "question_id": i + 1,
            "image": f"{i // 6}.jpg",
            "text": f"Is there a thing {i} in the image?",
            "label": label,
        }
        for i, label in enumerate(labels)
    ]
    write_lines(folder / f"coco_pope_{split}.json", rows)
    return rows


@pytest.fixture
def pope(tmp_path: Path) -> tuple[Path, Path]:
    """Return the folder of data and the file of answers, in POPE's own format."""
    rows = pope_data(tmp_path / "pope", [label for _, label in POPE_CASES])
    answers = [
        {"question": row["text"].lower(), "answer": answer}
        for row, (answer, _) in zip(rows, POPE_CASES, strict=True)
    ]
    return tmp_path / "pope", write_lines(tmp_path / "answers.json", answers)


@pytest.mark.parametrize(
    ("rule", "unit", "wanted"),
    [
        (
            "official",
            "fraction",
            {"tp": 5, "fp": 7, "tn": 2, "fn": 2, "accuracy": 0.4375, "precision": 5 / 12}
            | {"recall": 5 / 7, "f1": 10 / 19, "yes_ratio": 0.75},
        ),
        (
            "lmms-eval",
            "fraction",
            {"accuracy": 0.1875, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 0.4375},
        ),
        (
            "vlmevalkit",
            "percent",
            {"f1": 66.6667, "accuracy": 43.75, "precision": 80.0, "recall": 57.1429},
        ),
    ],
)
def test_pope_scores_equal_published_values_under_every_rule(
    pope: tuple[Path, Path], rule: str, unit: str, wanted: Any
) -> None:
    data, answers = pope
    scores = score("pope", answers, data, rule)
    assert scores["splits"]["random"] == scores["splits"]["all"]
    found = {name: scores["splits"]["random"][name] for name in wanted}
    assert found == pytest.approx(wanted, abs=5e-5)
    assert (scores["unit"], scores["version"], scores["items"]) == (unit, "unknown", 16)
    assert scores["images"] == 3


def test_constant_baselines_have_null_for_undefined_metrics(pope: tuple[Path, Path]) -> None:
    data, answers = pope
    scores = score("pope", answers, data)
    always, never = scores["baselines"]["yes"]["all"], scores["baselines"]["no"]["all"]
    assert (always["accuracy"], never["accuracy"]) == (7 / 16, 9 / 16)
    assert always["yes_ratio"] == 1
    assert never["precision"] is None  # nothing is said to be there
    assert scores["yes_ratio"] == 0.75
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("rule", ["lmms-eval", "vlmevalkit"])
def test_undefined_metrics_are_0_under_rules_whose_program_gives_0(
    pope: tuple[Path, Path], rule: str
) -> None:
    data, answers = pope
    never = score("pope", answers, data, rule)["baselines"]["no"]["all"]
    assert (never["precision"], never["recall"], never["f1"]) == (0, 0, 0)


def llava_answers(rows: list[dict[str, Any]], first_id: int) -> list[dict[str, Any]]:
    suffix = "\nAnswer the question using a single word or phrase."
    return [
        {"question_id": first_id + i, "prompt": row["text"] + suffix, "text": "Yes", "metadata": {}}
        for i, row in enumerate(rows)
    ]


def test_llava_question_ids_identify_the_split_in_any_order(tmp_path: Path) -> None:
    data, labels = tmp_path / "pope", ["yes", "no", "no"]
    answers = []
    for split, first_id in (("random", 10000001), ("popular", 20000001), ("adversarial", 1)):
        answers += llava_answers(pope_data(data, labels, split), first_id)
    answers[-1]["text"] = "No"
    path = write_lines(tmp_path / "llava.jsonl", answers[::-1])
    scores = score("pope", path, data)
    assert [*scores["splits"]] == ["all", "random", "popular", "adversarial"]
    accuracies = {name: found["accuracy"] for name, found in scores["splits"].items()}
    assert accuracies == pytest.approx(
        {"all": 4 / 9, "random": 1 / 3, "popular": 1 / 3, "adversarial": 2 / 3}
    )


def test_an_answer_by_image_and_text_counts_in_every_split_with_that_question(
    tmp_path: Path,
) -> None:
    data = tmp_path / "pope"
    rows = pope_data(data, ["yes", "no"], "random")
    pope_data(data, ["yes", "no"], "adversarial")
    own = [{"image": row["image"], "text": row["text"], "answer": "No"} for row in rows]
    scores = score("pope", write_lines(tmp_path / "own.jsonl", own), data)
    assert scores["items"] == 4
    assert scores["splits"]["adversarial"]["tn"] == 1


def test_answers_that_do_not_match_the_data_are_refused_with_counts(
    tmp_path: Path, monkeypatch
) -> None:
    data = tmp_path / "pope"
    rows = pope_data(data, ["yes", "no", "no"], "adversarial")
    answers = llava_answers(rows, 1)

    def refused(changed: list[dict[str, Any]], **options: Any) -> str:
        path = write_lines(tmp_path / "a.jsonl", changed)
        with pytest.raises(RefusedError) as error:
            score("pope", path, data, **options)
        return str(error.value)

    short = refused(answers[:2])
    assert "each of the 3 questions of the data once, got answers to 2: 1 have no answer" in short
    assert "coco_pope_adversarial.json, line 3" in short
    assert "--allow-subset" in short
    other = [*answers[:2], {**answers[2], "prompt": "Is there a bird in the image?"}]
    assert "1 answers are to no question of the data, first a.jsonl, line 3" in refused(other)
    assert "--allow-subset" not in refused(other)
    assert "1 answers are to a question again" in refused([*answers, answers[0]])
    assert "1 answers are to a question again" in refused([*answers, answers[0]], allow_subset=True)
    assert "text must be a string, got 3" in refused([{**answers[0], "text": 3}, *answers[1:]])
    assert "must have one of these sets of fields" in refused([{"id": 1, "said": "Yes"}])
    assert "line 2 requires prompt" in refused([answers[0], {"question_id": 2, "text": "x"}])
    in_order = [{"question": row["text"], "answer": "Yes"} for row in rows]
    assert score("pope", write_lines(tmp_path / "o.json", in_order), data)["items"] == 3
    assert "in the order of the data" in refused(in_order[::-1])
    assert "adversarial 3" in refused(in_order[:2])

    part = score("pope", write_lines(tmp_path / "p.jsonl", answers[:2]), data, allow_subset=True)
    assert (part["subset"], part["items"], part["version"]) == ("2 of 3", 2, "unknown")
    digest = rows_digest([*rows], *POPE.version_keys)
    monkeypatch.setitem(POPE.versions, digest, "mine")  # the version is that of the data
    assert score("pope", tmp_path / "p.jsonl", data, allow_subset=True)["version"] == "mine"
    prefix = write_lines(tmp_path / "q.jsonl", in_order[:2])
    assert score("pope", prefix, data, allow_subset=True)["subset"] == "2 of 3"


def test_unknown_names_and_missing_folders_are_refused(
    pope: tuple[Path, Path], tmp_path: Path
) -> None:
    data, answers = pope
    names = "benchmark must be one of pope, hallusionbench, .*, amber, got 'popes'"
    with pytest.raises(RefusedError, match=names):
        score("popes", answers, data)
    with pytest.raises(RefusedError, match="rule must be one of official, lmms-eval, vlmevalkit"):
        score("pope", answers, data, "mine")
    with pytest.raises(RefusedError, match="data must hold the files of HallusionBench"):
        score("hallusionbench", answers, data)
    with pytest.raises(RefusedError, match="answers must be a file"):
        score("pope", tmp_path / "none.jsonl", data)


@pytest.mark.parametrize("field", ["image", "text"])
@pytest.mark.parametrize("value", [[], {}, ["0.jpg"]])
def test_answers_without_a_question_id_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    rows = pope_data(tmp_path / "pope", ["yes"])
    record = {"image": rows[0]["image"], "text": rows[0]["text"], "answer": "Yes", field: value}
    with pytest.raises(RefusedError, match=f"line 1: {field} must be a string or a number"):
        score("pope", write_lines(tmp_path / "a.jsonl", [record]), tmp_path / "pope")


def test_two_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = case_a()[4:6]
    rows[1]["question_id"] = rows[0]["question_id"]
    write_list(tmp_path / "HallusionBench.json", rows)
    answers = write_list(tmp_path / "a.json", rows)
    message = r"entry 2 must have an id of its own, got VS_map_0_1_0, which .* entry 1 has too"
    with pytest.raises(RefusedError, match=message):
        score("hallusionbench", answers, tmp_path)


def test_a_negative_number_of_draws_is_refused(pope: tuple[Path, Path]) -> None:
    data, answers = pope
    with pytest.raises(RefusedError, match="bootstrap must be at least 0, got -1"):
        score("pope", answers, data, bootstrap=-1)
    with pytest.raises(RefusedError, match="seed must be at least 0, got -1"):
        score("pope", answers, data, bootstrap=10, seed=-1)


def case_a() -> list[dict[str, Any]]:
    """Return two sets of HallusionBench with answers, and a judge's verdicts on them."""
    items: list[tuple[str, str, str, str, str, str]] = []
    no_figure = [("No.", "1"), ("I do not know.", "2"), ("No.", "1"), ("No.", "0")]
    first = [("No.", "1"), ("Yes.", "1"), ("It is unclear.", "2"), ("Yes.", "1")]
    second = [("Yes, it is larger.", "1"), ("No, it is smaller.", "1"), ("Yes", "1"), ("No", "1")]
    for figure, answers, truths in (
        ("0", no_figure, "0101"),
        ("1", first, "0101"),
        ("2", second, "1010"),
    ):
        for i, (prediction, code) in enumerate(answers):
            items.append(("VS_map", figure, str(i), truths[i], prediction, code))
    same = "Yes, they are the same size."
    for figure, answers, truths in (
        ("0", [(same, "1"), ("No", "1"), ("No", "1")], "100"),
        ("1", [(same, "0"), ("The right one is larger.", "1"), ("No", "1")], "010"),
    ):
        for i, (prediction, code) in enumerate(answers):
            items.append(("VD_illusion", figure, str(i), truths[i], prediction, code))
    rows = []
    for kind, figure, question, truth, prediction, code in items:
        category, subcategory = kind.split("_")
        seen = figure if category == "VS" else str(int(figure) + 1)
        rows.append(
            {
                "category": category,
                "subcategory": subcategory,
                "visual_input": seen,
                "set_id": "0",
                "figure_id": figure,
                "question_id": question,
                "question": f"{kind} {question}?",
                "gt_answer": truth,
                "filename": None if seen == "0" else f"./{kind}/0_{figure}.png",
                "model_prediction": prediction,
                "gpt4v_output_gpt_check": code,
            }
        )
    return rows


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (
            "official",
            {"aacc": 83.3333, "facc": 50.0, "qacc": 57.1429, "easy": 71.4286, "hard": 85.7143},
        ),
        ("lmms-eval", {"aacc": 85.7143, "facc": 50.0, "qacc": 71.4286}),
        ("lmms-eval-intern", {"aacc": 85.7143, "facc": 75.0, "qacc": 71.4286}),
        ("vlmevalkit", {"aacc": 78.5714, "facc": 50.0, "qacc": 57.1429}),
    ],
)
def test_hallusionbench_scores_equal_published_values_under_every_rule(
    tmp_path: Path, rule: str, wanted: dict[str, float]
) -> None:
    rows = case_a()
    write_list(tmp_path / "data" / "HallusionBench.json", rows)
    answers = write_list(tmp_path / "result.json", rows[::-1])
    scores = score("hallusionbench", answers, tmp_path / "data", rule)
    assert scores["splits"]["all"] == wanted
    assert scores["items"] == (18 if rule == "official" else 14)
    assert bool(scores["baselines"]) == (rule in ("lmms-eval-intern", "vlmevalkit"))


def test_the_exact_rule_reads_yes_and_no_and_counts_unclear_without_a_figure(
    tmp_path: Path,
) -> None:
    rows = case_a()
    write_list(tmp_path / "HallusionBench.json", rows)
    scores = score("hallusionbench", write_list(tmp_path / "a.json", rows), tmp_path, "exact")
    # by the words 11 of the 14 questions with a figure are right, as VLMEvalKit has it; without
    # one "No." is right, "I do not know." is unclear, "No." is right, and the last "No." is wrong
    assert scores["splits"]["all"]["aacc"] == pytest.approx(100 * 14 / 18, abs=5e-5)
    for row in rows:
        row["model_prediction"] = "Yes" if row["gt_answer"] == "1" else "No."
    right = score("hallusionbench", write_list(tmp_path / "t.json", rows), tmp_path, "exact")
    assert {*right["splits"]["all"].values()} == {100.0}


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("correct", 1),
        ("Incorrect.", 0),
        ("unclear", 2),
        ("The answer is not correct.", 1),
        ("INCORRECT", 0),
        ("I cannot tell.", 2),
        ("Output: “correct”", 1),
        ("", 2),
    ],
)
def test_judge_replies_are_read_as_by_the_official_script(
    tmp_path: Path, reply: str, code: int
) -> None:
    (row, *_) = case_a()[4:]  # a question about a figure
    del row["gpt4v_output_gpt_check"]
    write_list(tmp_path / "HallusionBench.json", [row])
    answers = write_list(tmp_path / "a.json", [{**row, "judge_reply": reply}])
    scores = score("hallusionbench", answers, tmp_path)
    assert scores["splits"]["all"]["aacc"] == (100.0 if code == 1 else 0.0)
    unjudged = write_list(tmp_path / "b.json", [row])
    with pytest.raises(RefusedError, match=r"requires the replies of a judge .*--rule exact"):
        score("hallusionbench", unjudged, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "first for question VS_map_0_0_0.*--rule exact"),
        ({"judge_reply": None}, "first for question VS_map_0_0_0.*--rule exact"),
        ({"gpt4v_output_gpt_check": 3}, "must be 0, 1 or 2, .* question VS_map_0_0_0 has 3"),
        ({"judge_reply": 3}, r"entry 1: judge_reply must be a string, null, or a list"),
        ({"judge_reply": []}, r"entry 1: judge_reply must be a string, null, or a list"),
    ],
)
def test_answers_by_id_without_a_verdict_are_refused(
    tmp_path: Path, fields: Any, message: str
) -> None:
    (row, *_) = case_a()
    write_list(tmp_path / "HallusionBench.json", [row])
    record = {"id": "VS_map_0_0_0", "answer": "No", **fields}
    answers = write_list(tmp_path / "a.json", [record])
    with pytest.raises(RefusedError, match=message):
        score("hallusionbench", answers, tmp_path)
    judged = write_list(tmp_path / "b.json", [{**record, "judge_reply": "correct"}])
    assert score("hallusionbench", judged, tmp_path)["splits"]["all"]["aacc"] == 100.0


def test_a_rule_for_questions_with_an_image_requires_no_other_answers(tmp_path: Path) -> None:
    rows = case_a()
    write_list(tmp_path / "HallusionBench.json", rows)
    shown = [row for row in rows if row["filename"]]
    part = write_list(tmp_path / "a.json", shown)
    for row in rows:
        if not row["filename"]:
            del row["gpt4v_output_gpt_check"]
    whole = write_list(tmp_path / "b.json", rows)
    scores = score("hallusionbench", part, tmp_path, "lmms-eval")
    assert (scores["items"], scores["subset"]) == (14, None)
    assert score("hallusionbench", whole, tmp_path, "lmms-eval") == scores
    with pytest.raises(RefusedError, match=r"each of the 18 questions .* 4 have no answer"):
        score("hallusionbench", part, tmp_path, "exact")
    fewer = write_list(tmp_path / "c.json", shown[1:])
    found = score("hallusionbench", fewer, tmp_path, "lmms-eval", allow_subset=True)
    assert found["subset"] == "13 of 14"


def test_an_id_of_another_release_is_refused(tmp_path: Path) -> None:
    rows = case_a()
    write_list(tmp_path / "HallusionBench.json", rows)
    other = [{**rows[0], "question": "Is it another question?"}, *rows[1:]]
    with pytest.raises(RefusedError, match=r"to no question of the data, first a\.json, entry 1"):
        score("hallusionbench", write_list(tmp_path / "a.json", other), tmp_path)
    for row in rows:
        row.pop("question")  # the ids are enough where there is none
    scores = score("hallusionbench", write_list(tmp_path / "b.json", rows), tmp_path)
    assert scores["items"] == 18


def test_the_version_depends_on_which_questions_have_an_image(tmp_path: Path) -> None:
    rows = case_a()
    write_list(tmp_path / "HallusionBench.json", rows)
    (task,) = HALLUSIONBENCH.read_tasks(tmp_path).values()
    before = rows_digest(task.rows, *HALLUSIONBENCH.version_keys)
    rows[-1]["filename"] = None
    write_list(tmp_path / "HallusionBench.json", rows)
    (task,) = HALLUSIONBENCH.read_tasks(tmp_path).values()
    assert rows_digest(task.rows, *HALLUSIONBENCH.version_keys) != before


AMBER_CASES = [  # id, type, truth, answer
    (1005, "discriminative-attribute-state", "yes", "Yes"),
    (1006, "discriminative-attribute-state", "no", "No"),
    (1013, "discriminative-attribute-state", "yes", "yes"),
    (1014, "discriminative-attribute-state", "no", "No."),
    (1017, "discriminative-attribute-action", "yes", "Yes, the man sits."),
    (1018, "discriminative-attribute-action", "no", "No"),
    (8633, "discriminative-hallucination", "no", "No"),
    (8634, "discriminative-hallucination", "no", "Yes"),
    (13557, "discriminative-relation", "yes", "No"),
    (13558, "relation", "no", " No"),
    (1007, "discriminative-attribute-number", "yes", "I do not know"),
    (1008, "discriminative-attribute-number", "no", "Nothing like that"),
]


@pytest.fixture
def amber(tmp_path: Path) -> tuple[Path, Path]:
    data = tmp_path / "amber"
    questions = [
        {"id": number, "image": f"AMBER_{number % 5}.jpg", "query": f"Is it {number}?"}
        for number, *_ in AMBER_CASES
    ]
    write_list(data / "query" / "query_discriminative.json", questions)
    write_list(
        data / "annotations.json",
        [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}]
        + [{"id": i, "type": kind, "truth": truth} for i, kind, truth, _ in AMBER_CASES],
    )
    answers = [{"id": number, "response": answer} for number, _, _, answer in AMBER_CASES]
    return data, write_list(tmp_path / "answers.json", answers)


def test_amber_scores_equal_those_of_the_official_rule(amber: tuple[Path, Path]) -> None:
    data, answers = amber
    scores = score("amber-discriminative", answers, data)
    names = ("accuracy", "precision", "recall", "f1")
    assert {
        split: tuple(found[name] for name in names) for split, found in scores["splits"].items()
    } == {
        "all": (33.3, 75.0, 42.9, 54.6),
        "existence": (50.0, 99.9, 50.0, 66.6),
        "attribute": (37.5, 99.9, 50.0, 66.6),
        "state": (50.0, 99.9, 50.0, 66.6),
        "number": (0.0, 0.0, 0.0, 0.0),
        "action": (50.0, 99.9, 99.9, 99.9),
        "relation": (0.0, 0.0, 0.0, 0.0),
    }
    constant = scores["baselines"]["no"]["existence"]
    assert (constant["accuracy"], constant["recall"]) == (100.0, 100.0)
    assert scores["splits"]["all"]["tp"] == 3
    # two of the twelve are Yes to the letter
    assert scores["splits"]["all"]["yes_ratio"] == pytest.approx(100 * scores["yes_ratio"])
    assert scores["yes_ratio"] == pytest.approx(2 / 12)


def test_amber_rounds_a_half_as_the_official_script_does() -> None:
    # precision 98.9, recall 66.6: the script prints 79.5, other orders of the same steps 79.6
    counts = np.array([1346.0, 890, 890, 10, 0, 446, 0])
    metrics = official_metrics(epsilon=0.001)(counts)
    assert [metrics[name] for name in ("precision", "recall", "f1")] == [98.9, 66.6, 79.5]


def test_draws_without_a_question_of_a_dimension_are_omitted(
    amber: tuple[Path, Path],
) -> None:
    data, answers = amber
    scores = score("amber-discriminative", answers, data, "vlmevalkit", bootstrap=200)
    low, high = scores["intervals"]["existence"]["accuracy"]
    assert 0 <= low <= high <= 100


def test_amber_scores_equal_those_of_the_vlmevalkit_rule(amber: tuple[Path, Path]) -> None:
    data, answers = amber
    splits = score("amber-discriminative", answers, data, "vlmevalkit")["splits"]
    found = {name: splits[name]["accuracy"] for name in ("attribute", "existence", "relation")}
    assert found == {"attribute": 75.0, "existence": 50.0, "relation": 50.0}
    assert splits["all"]["accuracy"] == pytest.approx(58.3333, abs=5e-5)


def test_amber_requires_its_annotations(amber: tuple[Path, Path]) -> None:
    data, answers = amber
    (data / "annotations.json").unlink()
    with pytest.raises(RefusedError, match=r"data requires annotations\.json beside"):
        score("amber-discriminative", answers, data)


def test_intervals_are_binomial_where_every_image_has_one_question(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    labels = ["yes" if value else "no" for value in rng.integers(0, 2, 400)]
    rows = pope_data(tmp_path / "pope", labels)
    for i, row in enumerate(rows):
        row["image"] = f"{i}.jpg"
    write_lines(tmp_path / "pope" / "coco_pope_random.json", rows)
    predictions = ["Yes" if value else "No" for value in rng.integers(0, 2, 400)]
    answers = [
        {"image": row["image"], "text": row["text"], "answer": answer}
        for row, answer in zip(rows, predictions, strict=True)
    ]
    path = write_lines(tmp_path / "a.jsonl", answers)
    scores = score("pope", path, tmp_path / "pope", bootstrap=10_000, seed=1)
    value = scores["splits"]["all"]["accuracy"]
    low, high = scores["intervals"]["all"]["accuracy"]
    error = 1.96 * (value * (1 - value) / 400) ** 0.5
    assert (low, high) == pytest.approx((value - error, value + error), abs=0.004)
    assert scores["intervals"]["random"] == scores["intervals"]["all"]  # one draw for both
    assert score("pope", path, tmp_path / "pope", bootstrap=10_000, seed=1) == scores


def test_the_command_prints_a_table_or_json_and_loads_no_torch(pope: tuple[Path, Path]) -> None:
    data, answers = pope
    given = ["eval", "score", "--benchmark", "pope", "--data", str(data), "--answers", str(answers)]
    printed = CliRunner().invoke(app, [*given, "--bootstrap", "50"])
    assert printed.exit_code == 0, printed.output
    title = "pope, rule official, data version unknown: 16 answers on 3 images"
    assert title in " ".join(printed.output.split())
    assert all(line in printed.output for line in ("0.4375", "all yes", "95 %", "—"))
    assert "\nValues are fractions, except for counts. " in printed.output
    code = (
        "import sys; from realign.cli import main\n"
        f"sys.argv = ['realign', *{given!r}, '--json']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & {*sys.modules}\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == score("pope", answers, data)
    refused = CliRunner().invoke(app, [*given, "--rule", "mine"])
    assert refused.exit_code == 2
    lost = CliRunner().invoke(app, ["eval", "--seed", "1", *given[1:]])
    assert lost.exit_code == 2
    assert "--seed must be given after 'score'" in lost.output
