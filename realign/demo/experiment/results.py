"""Collect the results of an experiment as JSON values: tuning, scores of every view, claims."""

from __future__ import annotations

from typing import Any

from realign.demo.experiment.claims import judge
from realign.demo.experiment.protocol import BASE, View
from realign.demo.experiment.scores import object_f1
from realign.demo.experiment.search import edges
from realign.demo.experiment.stages import Experiment
from realign.runtime.files import finite_or_null
from realign.runtime.strict_json import read_json

DIGITS = 6
KEPT = ("free.chair_i", "free.recall")  # measures kept of every tuning run


def results(experiment: Experiment) -> dict[str, Any]:
    """Return the results of an experiment; undefined numbers are None.

    Args:
        experiment: Experiment whose runs are done.
    """
    protocol = experiment.protocol
    tuned = [one for one in protocol.conditions if one.is_tuned]
    views = [View(BASE), *experiment.views]
    found = {
        **experiment.identity,
        "tuning": {one.name: _tuning(experiment, one.name) for one in tuned},
        "views": [_view(experiment, view) for view in views],
        "claims": judge(experiment),
    }
    rounded: dict[str, Any] = _rounded(finite_or_null(found))
    return rounded


def seconds(experiment: Experiment) -> dict[str, float]:
    """Return name to CPU seconds of every set of pairs and every run."""
    folder = experiment.out / "seconds"
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def _tuning(experiment: Experiment, name: str) -> dict[str, Any]:
    protocol = experiment.protocol
    condition = protocol.condition(name)
    grid, known = protocol.grid_of(condition), experiment.known(condition)
    return {
        "best": experiment.chosen(name)._asdict(),
        "edges": edges(grid, known),
        "settings": [
            setting._asdict()
            | {"object_f1": known[setting]}
            | {
                str(seed): {measure: one[measure] for measure in KEPT} | {"f1": object_f1(one)}
                if one
                else None
                for seed, one in zip(protocol.tuning_seeds, of_seeds, strict=True)
            }
            for setting, of_seeds in sorted(experiment.trial_scores(condition).items())
        ],
    }


def _view(experiment: Experiment, view: View) -> dict[str, Any]:
    row: dict[str, Any] = {
        "condition": view.condition,
        "at": view.at,
        "scores": {str(seed): one for seed, one in experiment.scores_of(view).items()},
    }
    if view.condition != BASE:
        setting = experiment.chosen(view.condition)
        condition = experiment.protocol.condition(view.condition)
        steps = experiment.steps(view)
        row |= {
            "learning_rate": setting.learning_rate,
            "beta": setting.beta,
            "steps": steps,
            "rows": steps * condition.rows_per_pair,
        }
    return row


def _rounded(value: Any) -> Any:
    """Round scores; learning rates and other small settings keep all their digits."""
    if isinstance(value, float):
        return round(value, DIGITS) if abs(value) >= 10**-DIGITS else value
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [*map(_rounded, value)] if isinstance(value, list) else value
