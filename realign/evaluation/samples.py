"""Answers to look at: the first on which the baseline and the last model differ, whoever is
right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from realign.evaluation.benchmark import Task, View
from realign.evaluation.rows import Row, item_key
from realign.generation.generator import Answer

NUM_SAMPLES = 4  # per task
Answers = Mapping[str, Mapping[tuple[str, str], Answer]]  # model -> item_key of a row -> answer
Sample = dict[str, Any]


def sample_answers(tasks: Mapping[str, Task], answers: Answers) -> list[Sample]:
    """Return the first differing answers of every task that its benchmark shows; those with marked
    words come first.
    """
    samples = [
        sample
        for name, task in tasks.items()
        if (show := task.benchmark.samples.get(name))
        for sample in islice(_differing(task, show, answers), NUM_SAMPLES)
    ]
    return sorted(
        samples,
        key=lambda sample: not any(said["absent_words"] for said in sample["answers"].values()),
    )


def _differing(task: Task, show: Callable[[Row, str], View], answers: Answers) -> Iterator[Sample]:
    models = list(answers)
    for row in task.rows:
        texts = {
            model: answers[model][item_key(row)].text.strip() for model in (models[0], models[-1])
        }
        shown = {model: show(row, text) for model, text in texts.items()}
        if len({*shown.values()}) > 1:
            yield {
                "benchmark": task.benchmark.name,
                "image": row["image"],
                "prompt": row["text"],
                "truth": shown[models[0]].truth,
                "answers": {
                    model: {
                        "text": texts[model],
                        "is_right": judged.is_right,
                        "absent_words": list(judged.absent_words),
                    }
                    for model, judged in shown.items()
                },
            }
