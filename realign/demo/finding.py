"""The beginning of the demo's page: what the models' scores show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realign.demo.models import DemoModel
from realign.evaluation.table import UNDEFINED, split_of
from realign.review.run_page import Lead

BASE = "base"
TITLE = "What the image pair is for"
COLUMNS = {  # heading to task, metric
    "CHAIR_i": ("chair", "chair_i"),
    "recall": ("chair", "recall"),
    "yes, random": ("pope_random", "yes_ratio"),
    "right, random": ("pope_random", "balanced_accuracy"),
    "right, adversarial": ("pope_adversarial", "balanced_accuracy"),
}


def finding(
    scores: Mapping[str, Any], models: Sequence[DemoModel], seconds: Mapping[str, float]
) -> Lead:
    """Return the sentences and the table with which the page begins.

    Args:
        scores: Content of the demo's ``scores.json``.
        models: Trained models.
        seconds: Model name to the CPU seconds of its training, unless it was interrupted.
    """
    splits = {row["task"]: split_of(scores, row)["models"] for row in scores["table"]}

    def percent(model: str, heading: str) -> str:
        task, metric = COLUMNS[heading]
        value = splits[task][model][metric]["value"]
        return UNDEFINED if value is None else f"{100 * value:.1f}"

    absent, present, yes, random, adversarial = COLUMNS
    sentences = [
        "Shortcut pairs can be told apart without the picture: the rejected description adds what "
        "habit expects, and every question has the chosen answer No. DPO learns just that. Its "
        f"model says yes to {percent('DPO shortcut', yes)} % of the random questions, of which "
        f"half are true, and names {percent('DPO shortcut', present)} % of the objects that are "
        f"there; before training it was {percent(BASE, yes)} % and {percent(BASE, present)} %.",
        "The image pair has the same words on both sides, so only looking at the picture helps. "
        f"Trained on it alone (vDPO), the model says yes to {percent('vDPO shortcut', yes)} %, "
        f"names {percent('vDPO shortcut', present)} % of the objects, and is right on "
        f"{percent('vDPO shortcut', adversarial)} % of the adversarial and "
        f"{percent('vDPO shortcut', random)} % of the random questions; before training it was "
        f"{percent(BASE, adversarial)} % and {percent(BASE, random)} %. rDPO, "
        f"which trains both pairs, says yes to {percent('rDPO shortcut', yes)} % and names "
        f"{percent('rDPO shortcut', present)} %.",
        "On the pairs that the pipeline makes, "
        f"{percent(BASE, absent)} % of the named objects are absent before training, "
        f"{percent('SFT', absent)} % after SFT, {percent('DPO', absent)} % after DPO, "
        f"{percent('rDPO', absent)} % after rDPO, and {percent('rDPO + NLL', absent)} % after rDPO "
        "with a log-likelihood term on the chosen answer.",
    ]
    if ratio := _cost(models, seconds):
        sentences.append(f"A pair costs rDPO {ratio:.1f} times the CPU time that it costs DPO.")
    sentences.append(
        "All values are percent, from one seed. CHAIR_i is the share of named objects that are "
        "absent; recall is the share of present objects that are named."
    )
    heads = ["model", "pairs", *COLUMNS, "CPU seconds"]
    rows = [[BASE, "", *(percent(BASE, heading) for heading in COLUMNS), ""]]
    for model in sorted(models, key=lambda model: model.pairs):
        spent = f"{seconds[model.name]:.0f}" if model.name in seconds else ""
        cells = (percent(model.name, heading) for heading in COLUMNS)
        rows.append([model.name, model.pairs, *cells, spent])
    return Lead(TITLE, sentences, heads, rows)


def _cost(models: Sequence[DemoModel], seconds: Mapping[str, float]) -> float | None:
    """Return the CPU time per pair of rDPO divided by that of DPO; None if it was not measured."""
    epochs = {model.name: model.epochs for model in models}
    if not {"DPO", "rDPO"} <= seconds.keys():
        return None
    return (seconds["rDPO"] / epochs["rDPO"]) / (seconds["DPO"] / epochs["DPO"])
