"""The scores of one model from the folder of an evaluation, found by the hashes of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from realign.evaluation.table import cut_note, draws_note, read_scores, score_rows, split_of
from realign.review.cards.run_facts import own_weights
from realign.runtime.strict_json import read_json


@dataclass(frozen=True)
class ScoreLine:
    """One metric as a card shows it.

    Attributes:
        label: Name of the metric.
        rule: Name of the rule that scored the answers.
        items: Number of questions.
        baseline: Value and interval of the baseline.
        value: Value and interval of the model.
        difference: Model minus baseline, with its interval.
    """

    label: str
    rule: str
    items: int
    baseline: str
    value: str
    difference: str


@dataclass(frozen=True)
class EvalScores:
    """The scores of one model beside those of the baseline.

    Attributes:
        model: Name of the model in the evaluation.
        scores: Content of ``scores.json``.
        claim: Content of ``eval.json``.
    """

    model: str
    scores: Mapping[str, Any]
    claim: Mapping[str, Any]

    @classmethod
    def find(cls, folder: Path, weights: Mapping[str, str]) -> EvalScores | None:
        """Return the scores of the model with these weights; None if they were not measured.

        Args:
            folder: Output folder of ``realign eval``.
            weights: File name to SHA-256 of the model's weights.
        Raises:
            RefusedError: The scores are of another version.
        """
        if not all((folder / name).is_file() for name in ("eval.json", "scores.json")):
            return None
        claim = read_json(folder / "eval.json")
        for model, files in claim["models"].items():
            if own_weights(files) == dict(weights):
                return cls(model, read_scores(folder / "scores.json"), claim)
        return None

    @property
    def baseline(self) -> str:
        """Name of the model with which the evaluation compares the others."""
        name: str = self.scores["baseline"]
        return name

    @property
    def is_baseline(self) -> bool:
        """Return whether the model is the baseline itself, so that there is no difference."""
        return self.model == self.baseline

    def is_of(self, files: Mapping[str, str]) -> bool:
        """Return whether the baseline is the model with these files, by their hashes."""
        return own_weights(self.claim["models"][self.baseline]) == own_weights(files)

    def lines(self) -> Iterator[ScoreLine]:
        """Yield a line for every metric of the table."""
        for row, cells in score_rows(self.scores):
            yield ScoreLine(
                row["label"],
                row["rule"],
                split_of(self.scores, row)["items"],
                _with_interval(cells[self.baseline], row["scale"]),
                _with_interval(cells[self.model], row["scale"]),
                cells[self.model].difference,
            )

    def notes(self) -> list[str]:
        """Return sentences about how the numbers were measured."""
        draws = self.scores["draws"]["bootstrap"]
        clusters = dict.fromkeys(found["cluster"] for found in self.scores["benchmarks"].values())
        asked = ", ".join(
            f"{name} with the prompt {prompt} and at most {self.claim['max_new_tokens'][name]:,} "
            "tokens per answer"
            for name, prompt in self.claim["prompts"].items()
        )
        about = (
            f"Measured with `realign eval`: greedy decoding in {self.claim['dtype']}, {asked}. "
            "Percent unless the label names a unit; in brackets 95 % intervals, percentiles of a "
            f"paired bootstrap by {' and '.join(clusters)} with {draws:,} draws."
        )
        return [about, *filter(None, (cut_note(self.scores), draws_note(self.scores)))]

    def results(self) -> Iterator[EvalResult]:
        """Yield every metric that has a value, for the metadata of a card."""
        for row, cells in score_rows(self.scores):
            bar, scale = cells[self.model].bar, row["scale"]
            if bar is None:
                continue
            split = split_of(self.scores, row)
            measured = split["models"][self.model][row["metric"]]
            arguments = {
                "rule": row["rule"],
                "items": split["items"],
                "interval_95": _scaled(measured["interval"], scale),
            }
            if not self.is_baseline:
                arguments |= {
                    "baseline": self.baseline,
                    "difference": _scaled([measured["difference"]], scale, single=True),
                    "difference_interval_95": _scaled(measured["difference_interval"], scale),
                }
            yield EvalResult(
                task_type="image-text-to-text",
                dataset_type=row["task"],
                dataset_name=f"{row['title']} ({row['task']})",
                metric_type=row["metric"],
                metric_name=row["label"],
                metric_value=round(scale * bar[0], 2),
                metric_args={key: value for key, value in arguments.items() if value is not None},
            )


def _with_interval(cell: Any, scale: int) -> str:
    if cell.bar is None:
        return f"{cell.value} {cell.difference}"  # why it has none
    _, low, high = cell.bar
    return f"{cell.value} [{scale * low:.1f}, {scale * high:.1f}]"


def _scaled(values: Any, scale: int, *, single: bool = False) -> Any:
    """Return numbers times the scale of their row, None where one is not defined."""
    if values is None or any(value is None for value in values):
        return None
    numbers = [round(scale * value, 2) for value in values]
    return numbers[0] if single else numbers
