"""Answers to look at: the first on which the baseline and the last model differ, whoever is
right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realign.evaluation.chair import mentioned
from realign.evaluation.pope import confusion
from realign.evaluation.tasks import Question
from realign.generation.generator import Answer

NUM_SAMPLES = 4  # of each kind
Answers = Mapping[str, Mapping[Question, Answer]]  # model -> question -> answer
Sample = dict[str, Any]


def caption_samples(
    rows: Sequence[Mapping[str, Any]], answers: Answers, synonyms: Mapping[str, list[str]]
) -> list[Sample]:
    """The first captions that name different absent objects."""
    samples: list[Sample] = []
    for row in rows:
        said = _first_and_last(row, answers)
        absent = {
            model: mentioned(text, synonyms) - set(row["objects"]) for model, text in said.items()
        }
        if _differ(absent) and len(samples) < NUM_SAMPLES:
            shown = {
                model: {
                    "text": text,
                    "is_right": not absent[model],
                    "absent_words": sorted(
                        {word.lower() for name in absent[model] for word in synonyms[name]}
                    ),
                }
                for model, text in said.items()
            }
            truth = f"in the image: {', '.join(row['objects'])}"
            samples.append(
                {"image": row["image"], "prompt": row["text"], "truth": truth, "answers": shown}
            )
    return samples


def question_samples(rows: Sequence[Mapping[str, Any]], answers: Answers) -> list[Sample]:
    """The first yes/no questions that one of the two gets wrong."""
    samples: list[Sample] = []
    for row in rows:
        said = _first_and_last(row, answers)
        is_right = {
            # the official rule: true yes and true no
            model: sum(confusion(row["label"], text)[::2]) == 1
            for model, text in said.items()
        }
        if _differ(is_right) and len(samples) < NUM_SAMPLES:
            shown = {
                model: {"text": text, "is_right": is_right[model], "absent_words": []}
                for model, text in said.items()
            }
            truth = f"right answer: {row['label']}"
            samples.append(
                {"image": row["image"], "prompt": row["text"], "truth": truth, "answers": shown}
            )
    return samples


def _first_and_last(row: Mapping[str, Any], answers: Answers) -> dict[str, str]:
    models = list(answers)
    return {
        model: answers[model][row["image"], row["text"]].text
        for model in dict.fromkeys((models[0], models[-1]))
    }


def _differ(by_model: Mapping[str, Any]) -> bool:
    first, *others = by_model.values()
    return any(other != first for other in others)
