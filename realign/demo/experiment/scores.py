"""Measures of the answers of a model: counts by image, by the rules of ``realign eval``, and the
AUC of its log-odds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realign.demo.experiment.scenes import SPLITS, Draw, Question
from realign.demo.world import PARTNER
from realign.evaluation.benchmark import Array
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.object_words import mentioned

_CHAIR = CHAIR.rules["object-list"]
_POPE = POPE.rules["official"]
# Columns of the counts of an image, after those of CHAIR's rule.
_CHAIR_WIDTH, _POPE_WIDTH = 4, 6
_CAPTION_COLUMNS = (
    "captions", "with_absent", "words", "cut", "coupled", "coupled_found", "lone", "lone_found",
    "partner_named",
)  # fmt: skip


@dataclass(frozen=True)
class ModelAnswers:
    """The answers of one model on some draws, ready to be scored.

    Attributes:
        counts: Set to counts, shape ``(images, columns)``: of captions, then of each split.
        odds: Set and split to log-odds of Yes, right answers (1 for yes) and images, each
            ``(questions,)``.
        divergences: Mean KL divergence from the base, one per draw; None where it wrote nothing.
    """

    counts: Mapping[str, Array]
    odds: Mapping[str, tuple[Array, Array, NDArray[np.int64]]]
    divergences: tuple[float | None, ...]

    @classmethod
    def of(cls, draws: Sequence[Draw], answers: Sequence[Mapping[str, Any]]) -> ModelAnswers:
        """Count the answers on each draw, and pool their images.

        Args:
            draws: Evaluation draws.
            answers: Of each, ``captions``, ``answers`` and ``divergence``, as a run keeps them; a
                set that was not asked about has no counts there.
        """
        counts, odds = {}, {}
        for name in answers[0]["captions"]:
            tables = [_counts(draw, name, one) for draw, one in zip(draws, answers, strict=True)]
            counts[name] = np.concatenate(tables)
            asked: dict[str, list[tuple[float, int, int]]] = {split: [] for split in SPLITS[name]}
            first = 0  # image of a draw among those of all
            for draw, one in zip(draws, answers, strict=True):
                for question, answer in _answered(draw, name, one):
                    row = (answer["log_odds"], question.label == "yes", first + question.scene)
                    for split in question.splits:
                        asked[split].append(row)
                first += len(draw.scenes[name])
            for split, rows in asked.items():
                values, labels, images = np.array(rows, dtype=np.float64).reshape(-1, 3).T
                odds[f"{name}.{split}"] = values, labels, images.astype(np.int64)
        return cls(counts, odds, tuple(one["divergence"] for one in answers))


def scores(answers: ModelAnswers, weights: Mapping[str, Array] | None = None) -> dict[str, float]:
    """Return all measures of a model's answers, NaN where one is not defined.

    Args:
        answers: Answers of the model.
        weights: Set to how often each image counts, shape ``(images,)``; once by default.
    """
    found: dict[str, float] = {}
    for name, counts in answers.counts.items():
        weight = np.ones(len(counts)) if weights is None else weights[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = weight @ counts
            measures = _caption_scores(sums)
            start = _CHAIR_WIDTH + len(_CAPTION_COLUMNS)
            for split in SPLITS[name]:
                metrics = _POPE.metrics(sums[start : start + _POPE_WIDTH])
                start += _POPE_WIDTH
                values, labels, images = answers.odds[f"{name}.{split}"]
                measures |= {
                    f"{split}.accuracy": metrics["accuracy"],
                    f"{split}.balanced_accuracy": metrics["balanced_accuracy"],
                    f"{split}.yes": metrics["yes_ratio"],
                    f"{split}.auc": area_under_curve(values, labels, weight[images]),
                }
        found |= {f"{name}.{measure}": float(value) for measure, value in measures.items()}
    if weights is None:
        defined = [value for value in answers.divergences if value is not None]
        found["kl"] = sum(defined) / len(defined) if defined else float("nan")
    return found


def object_f1(found: Mapping[str, float]) -> float:
    """Return the harmonic mean of 1 - CHAIR_i and recall on free scenes; 0 if one is undefined."""
    precision, recall = 1 - found["free.chair_i"], found["free.recall"]
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0  # also of NaN


def area_under_curve(values: Array, labels: Array, weights: Array | None = None) -> float:
    """Return the probability that a question with the answer yes has a higher value than one with
    the answer no, where equal values count half; NaN if either kind is missing.

    Args:
        values: Shape ``(questions,)``.
        labels: 1 for yes and 0 for no, the same shape.
        weights: How often each question counts; once by default.
    """
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    _, place = np.unique(values, return_inverse=True)
    of_yes, of_no = (
        np.bincount(place, weight * (labels == label), minlength=place.max(initial=-1) + 1)
        for label in (1, 0)
    )
    below = np.cumsum(of_no) - of_no
    total = of_yes.sum() * of_no.sum()
    return float((of_yes * (below + of_no / 2)).sum() / total) if total else float("nan")


def _answered(
    draw: Draw, name: str, answers: Mapping[str, Any]
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """Yield the questions of a set with their answers; nothing if the set was not asked."""
    if name in answers["answers"]:
        yield from zip(draw.questions[name], answers["answers"][name], strict=True)


def _counts(draw: Draw, name: str, answers: Mapping[str, Any]) -> Array:
    """Return the counts of every image of a set."""
    scenes, rows = draw.scenes[name], draw.rows[name]
    of_splits = {split: np.zeros((len(scenes), _POPE_WIDTH)) for split in SPLITS[name]}
    for question, answer in _answered(draw, name, answers):
        row = {"label": question.label}
        for split in question.splits:
            of_splits[split][question.scene] += _POPE.score(row, answer["text"])
    captions = [
        _caption_counts(row, scene.kinds, caption)
        for row, scene, caption in zip(rows, scenes, answers["captions"][name], strict=True)
    ]
    return np.concatenate([np.array(captions, dtype=np.float64), *of_splits.values()], axis=1)


def _caption_counts(
    row: dict[str, Any], kinds: frozenset[str], caption: Mapping[str, Any]
) -> list[float]:
    text = caption["text"]
    chair = [*_CHAIR.score(row, text)]
    named = mentioned(text, row["synonyms"])
    coupled = {kind for kind in kinds if PARTNER[kind] in kinds}
    lone = kinds - coupled
    return [
        *chair,
        1,
        int(chair[1] > 0),
        len(text.split()),
        int(caption["is_cut"]),
        len(coupled),
        len(coupled & named),
        len(lone),
        len(lone & named),
        sum(PARTNER[kind] in named for kind in lone),
    ]


def _caption_scores(sums: Array) -> dict[str, Any]:
    measures = dict(_CHAIR.metrics(sums[:_CHAIR_WIDTH]))
    count = dict(zip(_CAPTION_COLUMNS, sums[_CHAIR_WIDTH:], strict=False))
    return {
        "chair_i": measures["chair_i"],
        "chair_s": count["with_absent"] / count["captions"],
        "recall": measures["recall"],
        "recall_coupled": count["coupled_found"] / count["coupled"],
        "recall_lone": count["lone_found"] / count["lone"],
        "partner": count["partner_named"] / count["lone"],
        "words": count["words"] / count["captions"],
        "cut": count["cut"] / count["captions"],
    }
