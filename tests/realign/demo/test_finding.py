"""The sentences that the demo's page begins with take their numbers from the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from realign.demo.data import write_eval_data
from realign.demo.finding import BASE, COLUMNS, finding
from realign.demo.models import MODELS
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.registry import find_data, read_tasks


def scores() -> dict[str, Any]:
    """Every model has a value of its own in every column."""
    names = [BASE, *(model.name for model in MODELS)]
    table, benchmarks = [], {}
    for task in dict.fromkeys(task for task, _ in COLUMNS.values()):
        models = {
            name: {
                metric: {"value": (place + 10 * number) / 1000}
                for number, (of, metric) in enumerate(COLUMNS.values())
                if of == task
            }
            for place, name in enumerate(names)
        }
        table.append({"task": task, "benchmark": task, "rule": "rule", "split": "all"})
        benchmarks[task] = {"rules": {"rule": {"splits": {"all": {"models": models}}}}}
    return {"table": table, "benchmarks": benchmarks}


def test_the_finding_uses_the_scores_of_the_named_model() -> None:
    lead = finding(scores(), MODELS, {"DPO": 35.0, "rDPO": 46.0})
    values = {row[0]: dict(zip(lead.heads, row, strict=True)) for row in lead.rows}
    assert values.keys() == {BASE, *(model.name for model in MODELS)}
    shortcut, image, pipeline, cost, _ = lead.sentences
    assert f"yes to {values['DPO shortcut']['yes, random']} %" in shortcut
    assert f"it was {values[BASE]['yes, random']} % and {values[BASE]['recall']} %" in shortcut
    assert f"names {values['vDPO shortcut']['recall']} %" in image
    assert f"{values['vDPO shortcut']['right, random']} % of the random" in image
    assert f"{values['rDPO']['CHAIR_i']} % after rDPO," in pipeline
    assert values["DPO"]["CPU seconds"] == "35"
    assert values["SFT"]["CPU seconds"] == ""
    assert "2.0 times" in cost  # 46 / 2.3 epochs for 35 / 3.5


def test_the_cost_is_omitted_for_an_interrupted_run() -> None:
    lead = finding(scores(), MODELS, {"DPO": 35.0})
    assert not any("times the CPU time" in sentence for sentence in lead.sentences)


def test_a_score_that_is_not_defined_is_a_dash() -> None:
    found = scores()
    found["benchmarks"]["chair"]["rules"]["rule"]["splits"]["all"]["models"]["DPO"]["chair_i"] = {
        "value": None
    }
    rows = {row[0]: row for row in finding(found, MODELS, {}).rows}
    assert rows["DPO"][2] == "—"


def test_every_column_is_a_metric_of_a_demo_task(tmp_path: Path) -> None:
    write_eval_data(tmp_path, 2, seed=0)
    tasks = read_tasks(find_data(tmp_path / "eval", []))
    metrics = {
        "pope": POPE.rules["official"].metrics(np.ones(6)),
        "chair": CHAIR.rules["object-list"].metrics(np.ones(4)),
    }
    for task, metric in COLUMNS.values():
        assert task in tasks
        assert metric in metrics[tasks[task].benchmark.name]
