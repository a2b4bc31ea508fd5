"""The first thing that the demo's page says: what the models show, in their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realign.demo.models import DemoModel
from realign.evaluation.table import split_of
from realign.review.run_page import Lead

BASE = "base"
TITLE = "What the image pair is for"
COLUMNS = {  # heading to task, metric
    "absent objects named, % (CHAIR_i)": ("chair", "chair_i"),
    "present objects named, %": ("chair", "recall"),
    "yes to random questions, %": ("pope_random", "yes_ratio"),
    "right on random questions, %": ("pope_random", "balanced_accuracy"),
    "right on adversarial questions, %": ("pope_adversarial", "balanced_accuracy"),
}


def finding(
    scores: Mapping[str, Any], models: Sequence[DemoModel], seconds: Mapping[str, float]
) -> Lead:
    """Return the sentences and the table that the page begins with.

    Args:
        scores: What ``scores.json`` of the demo holds.
        models: The trained models.
        seconds: CPU seconds of their training, by name, for those that were trained in one go.
    """
    splits = {row["task"]: split_of(scores, row)["models"] for row in scores["table"]}

    def percent(model: str, heading: str) -> str:
        task, metric = COLUMNS[heading]
        return f"{100 * splits[task][model][metric]['value']:.1f}"

    absent, _, yes, *_ = COLUMNS
    sentences = [
        "The answers of the shortcut pairs can be told apart without the picture: the rejected one "
        "adds what habit expects, or says yes to it. On them DPO learns to say no: it says yes to "
        f"{percent('DPO shortcut', yes)} % of the random questions, of which half are true; the "
        f"model before training to {percent(BASE, yes)} %. The image pair of rDPO has the same "
        "words on both sides, so only looking helps: rDPO says yes to "
        f"{percent('rDPO shortcut', yes)} %.",
        "On the pairs that the pipeline builds, the model names absent objects in "
        f"{percent(BASE, absent)} % of the cases before training, {percent('DPO', absent)} % after "
        f"DPO, {percent('rDPO', absent)} % after rDPO and {percent('SFT', absent)} % after SFT on "
        "the chosen answers.",
    ]
    if ratio := _cost(models, seconds):
        sentences.append(f"A pair costs rDPO {ratio:.1f} times the CPU time that it costs DPO.")
    heads = ["model", "pairs", *COLUMNS, "CPU seconds of training"]
    rows = [[BASE, "", *(percent(BASE, heading) for heading in COLUMNS), ""]]
    for model in models:
        spent = f"{seconds[model.name]:.0f}" if model.name in seconds else ""
        cells = (percent(model.name, heading) for heading in COLUMNS)
        rows.append([model.name, model.pairs, *cells, spent])
    return Lead(TITLE, sentences, heads, rows)


def _cost(models: Sequence[DemoModel], seconds: Mapping[str, float]) -> float | None:
    """Return how many times the CPU time of DPO a pair of rDPO takes; None where it was not
    measured.
    """
    epochs = {model.name: model.epochs for model in models}
    if not {"DPO", "rDPO"} <= seconds.keys():
        return None
    return (seconds["rDPO"] / epochs["rDPO"]) / (seconds["DPO"] / epochs["DPO"])
