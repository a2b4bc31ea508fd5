"""A metric whose denominator is 0 has no value: null in files, a dash with the reason on pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realign.config import EvalConfig
from realign.demo.data import write_eval_data
from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, Layout, Rule, TableRow, Task
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.comparison import score
from realign.evaluation.run import evaluate
from realign.evaluation.table import draws_note, read_scores, score_rows, scores_table, split_of
from realign.generation.generator import Answer
from realign.review.report import write_report
from realign.runtime.files import read_jsonl, write_json, write_jsonl
from realign.runtime.strict_json import read_json

SYNONYMS = {"dog": ["dog"], "cat": ["cat"]}


def question(label: str, image: str = "a") -> dict[str, Any]:
    return {"image": image, "text": "x", "label": label}


def caption(*objects: str, image: str = "a") -> dict[str, Any]:
    return {"image": image, "text": "x", "objects": [*objects], "synonyms": SYNONYMS}


def scored(benchmark: Benchmark, rows: list[dict[str, Any]], **replies: str) -> dict[str, Any]:
    """Scores of models that say the same of every image, or one word of several an image."""
    task = next(iter(benchmark.layouts[0].files))
    answers = {}
    for model, texts in replies.items():
        split = texts.split("|")
        answers[model] = {
            (row["image"], "x"): Answer(split[i % len(split)]) for i, row in enumerate(rows)
        }
    with np.errstate(all="raise"):  # one of numpy's warnings is an error
        return score({task: Task(benchmark, rows)}, answers, resamples=200, seed=0)


def cells(scores: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the table that is shown: metric to (value, text below it) of each model."""
    return {
        row["metric"]: [(cell.value, cell.difference) for cell in by_model.values()]
        for row, by_model in score_rows(scores)
        if row["task"] in scores["tasks"]
    }


def check_files(scores: dict[str, Any], folder: Path) -> str:
    """Write and read the scores strictly; return the page about them."""
    scores = {**scores, "samples": []}  # of which there are no pictures here
    path = folder / "eval" / "scores.json"
    write_json(path, scores)
    assert read_json(path) == scores == read_scores(path)
    page = write_report(folder, folder / "report.html").read_text(encoding="utf-8")
    assert "nan" not in page.casefold().replace("dominan", "")
    return page


@pytest.mark.parametrize(
    ("benchmark", "rows", "reply", "undefined"),
    [
        (POPE, [question("yes")], "Yes", {"balanced_accuracy": "all questions have one right"}),
        (POPE, [question("yes")], "No", {"balanced_accuracy": "all questions have one right"}),
        (
            POPE,
            [question("no")],
            "No",
            {
                "balanced_accuracy": "all questions have one right answer",
                "f1": "yes is neither said nor right",
            },
        ),
        (POPE, [question("no")], "Yes", {"balanced_accuracy": "all questions have one right"}),
        (CHAIR, [caption("dog")], "A zebra.", {"chair_i": "no object was named"}),
        (CHAIR, [caption("dog")], "", {"chair_i": "no object was named"}),
        (CHAIR, [caption()], "A dog.", {"recall": "no image has an object to name"}),
        (
            CHAIR,
            [caption()],
            "A zebra.",
            {"chair_i": "no object was named", "recall": "no image has an object to name"},
        ),
    ],
)
def test_metrics_with_a_denominator_of_0_are_null_with_a_reason(
    tmp_path: Path,
    benchmark: Benchmark,
    rows: list[dict[str, Any]],
    reply: str,
    undefined: dict[str, str],
) -> None:
    scores = scored(benchmark, rows, base=reply, other=reply)
    (shown, *_) = scores["table"]
    models = split_of(scores, shown)["models"]
    shown_metrics = {row.metric for row in benchmark.table}
    nothing = {
        **dict.fromkeys(("value", "interval", "difference", "difference_interval", "paired")),
        "undefined_draws": 200,
        "difference_undefined_draws": 200,
    }
    for metrics in models.values():
        empty = {name for name, found in metrics.items() if found["value"] is None}
        assert empty & shown_metrics == {*undefined}
        for name in undefined:
            assert {key: metrics[name][key] for key in nothing} == nothing
    page = check_files(scores, tmp_path)
    for metric, shown in cells(scores).items():
        if metric in undefined:
            assert [value for value, _ in shown] == ["—", "—"]
            assert all(why.startswith(undefined[metric]) for _, why in shown)
            assert undefined[metric] in page
        else:
            assert "—" not in "".join(map("".join, shown))
    in_tiles = {row["metric"] for row in scores["table"] if row["is_headline"]}
    assert ("— → —" in page) == bool(in_tiles & {*undefined})
    printed = [str(cell) for cell in scores_table(scores).wide.columns[2].cells]
    assert sum(text.startswith("—  ") for text in printed) == len(undefined)


@pytest.mark.parametrize("order", [("named", "silent"), ("silent", "named")])
def test_a_difference_from_an_undefined_value_is_undefined(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    replies = {"named": "A dog.", "silent": "Nothing."}
    scores = scored(CHAIR, [caption("dog")], **{model: replies[model] for model in order})
    shown = dict(zip(order, cells(scores)["chair_i"], strict=True))
    assert shown["silent"] == ("—", "no object was named")
    below = "" if order[0] == "named" else "— silent has no value to compare with"
    assert shown["named"] == ("0.0", below)
    models = split_of(scores, scores["table"][0])["models"]
    assert models[order[1]]["chair_i"]["difference"] is None
    assert models[order[1]]["chair_i"]["difference_interval"] is None
    page = check_files(scores, tmp_path)
    assert "— no object was named" in page  # below the plot, which has one bar
    (row, *_) = (by_model for row, by_model in score_rows(scores) if row["metric"] == "chair_i")
    assert {cell.verdict for cell in row.values()} == {""}


def test_undefined_draws_are_omitted_and_counted(tmp_path: Path) -> None:
    rows = [caption("dog", image=image) for image in "abc"]
    scores = scored(CHAIR, rows, base="A dog.|-|-", other="A dog and a cat.|-|-")
    found = split_of(scores, scores["table"][0])["models"]["other"]["chair_i"]
    assert found["value"] == found["difference"] == 0.5
    assert found["interval"] == found["difference_interval"] == [0.5, 0.5]
    assert found["undefined_draws"] == pytest.approx(200 * (2 / 3) ** 3, abs=25)
    note = draws_note(scores)
    assert f"(no object was named): base {found['undefined_draws']}, other" in note
    assert note in check_files(scores, tmp_path)
    assert draws_note(scored(CHAIR, rows, base="A dog.", other="A dog.")) == ""


def test_infinite_values_count_as_a_denominator_of_0(tmp_path: Path) -> None:
    ratio = Benchmark(
        name="ratio",
        title="Ratio",
        layouts=[Layout({"ratio": ("ratio.jsonl",)}, lambda path: [])],
        rules={
            "r": Rule(
                lambda row, answer: [1, 0], lambda sums: {"ratio": sums[..., 0] / sums[..., 1]}
            )
        },
        table=[TableRow("ratio", "r", "ratio", "ratio", is_headline=True)],
    )
    scores = scored(ratio, [question("yes")], base="a", other="b")
    assert cells(scores) == {"ratio": [("—", "there was nothing to count")] * 2}
    assert "— there was nothing to count" in check_files(scores, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2'])
def test_scores_that_are_not_json_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(RefusedError, match=r"scores\.json must hold a JSON object, got"):
        read_scores(tmp_path / "scores.json")


def test_commands_run_on_images_without_named_objects(tmp_path: Path, model_dir: Path) -> None:
    write_eval_data(tmp_path, 2, seed=0)
    for path in (tmp_path / "eval").glob("pope_*"):
        path.unlink()
    path = tmp_path / "eval" / "chair.jsonl"
    write_jsonl(path, [{**row, "objects": []} for row in read_jsonl(path)])
    (tmp_path / "eval" / "chair_objects.json").write_text(json.dumps({"zebra": ["zebra"]}))
    out = tmp_path / "run" / "eval"
    config = EvalConfig(
        models={"base": str(model_dir), "again": str(model_dir)},
        data=tmp_path / "eval",
        images=tmp_path / "images",
        out=out,
        bootstrap=20,
    )
    scores = evaluate(config)
    assert read_json(out / "scores.json") == scores
    page = write_report(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no object was named" in page
    assert "no image has an object to name" in page
