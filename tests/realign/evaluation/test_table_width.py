"""Tables of scores in a terminal of 80 columns: every word and number whole, on one line."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from realign.evaluation import score
from realign.evaluation.answer_table import answer_table
from realign.evaluation.comparison import score as compare_runs
from realign.evaluation.registry import find_data, read_tasks
from realign.evaluation.rows import item_key
from realign.evaluation.table import scores_table
from realign.generation.generator import Answer
from tests.realign.evaluation.published import write_published

KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "relation": "relation",
}
MODELS = ("base", "DPO", "SFT", "rDPO + NLL")


def printed(shown: RenderableType, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(shown)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def amber(tmp_path: Path) -> dict[str, Any]:
    """Scores of AMBER's questions, whose splits are seven."""
    numbers = range(40)
    kinds = [*KINDS] * 8
    rows = {
        "query/query_discriminative.json": [
            {"id": n, "image": f"AMBER_{n}.jpg", "query": f"Is it {n}?"} for n in numbers
        ],
        "annotations.json": [{"id": n, "type": kinds[n], "truth": "no"} for n in numbers],
        "answers.json": [{"id": n, "response": "No" if n % 3 else "Yes"} for n in numbers],
    }
    (tmp_path / "query").mkdir()
    for name, content in rows.items():
        (tmp_path / name).write_text(json.dumps(content))
    return score("amber-discriminative", [tmp_path / "answers.json"], tmp_path, bootstrap=20)


def test_many_splits_are_rows_where_columns_do_not_fit(amber: dict[str, Any]) -> None:
    lines = printed(answer_table(amber), 80)
    words = [line.split() for line in lines]
    splits = [*amber["splits"]]
    assert len(splits) == 7
    start = next(number for number, line in enumerate(words) if line[:1] == ["accuracy"])
    rows = [words[start][1:], *words[start + 1 : start + 7]]
    assert [row[0] for row in rows] == splits
    for row, split in zip(rows, splits, strict=True):
        low, high = amber["intervals"][split]["accuracy"]
        constants = [
            f"{baseline[split]['accuracy']:.2f}" for baseline in amber["baselines"].values()
        ]
        value = f"{amber['splits'][split]['accuracy']:.2f}"
        assert row[1:] == [value, f"{low:.1f}-{high:.1f}", *constants]
    counts = {
        row[0]: row[1:] for row in words[words.index(["split", "tp", "fp", "tn", "fn"]) :] if row
    }
    for split in splits:
        values = amber["splits"][split]
        assert counts[split] == [str(values[name]) for name in ("tp", "fp", "tn", "fn")]


def test_columns_are_kept_where_they_fit(amber: dict[str, Any]) -> None:
    (header,) = (line for line in printed(answer_table(amber), 130) if "attribute" in line)
    assert [*amber["splits"]] == header.replace("┃", " ").split()


@pytest.mark.parametrize("width", [80, 300])
def test_four_models_are_compared_without_a_broken_cell(tmp_path: Path, width: int) -> None:
    write_published("pope", tmp_path, tmp_path / "images")
    tasks = read_tasks(find_data(tmp_path, ["pope"]))
    keys = [item_key(row) for task in tasks.values() for row in task.rows]
    answers = {
        model: {
            key: Answer("Yes" if place % 4 < number else "No") for place, key in enumerate(keys)
        }
        for number, model in enumerate(MODELS, start=1)
    }
    scores = compare_runs(tasks, answers, resamples=50, seed=0)
    lines = printed(scores_table(scores), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for row in scores["table"]:
        assert row["label"] in text
    assert text.count("inside the noise") >= 3 * len(scores["table"])
    if width == 80:
        for model in MODELS:
            own = [line for line in lines if line.startswith(f"{model} ")]
            assert len(own) == len(scores["table"])
            assert all("says yes" in line for line in own)
