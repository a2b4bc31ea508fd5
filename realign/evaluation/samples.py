"""Sample answers: the first ones that the last model gained, lost or otherwise changed in
comparison with the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from realign.evaluation.benchmark import Task, View
from realign.evaluation.rows import Row, item_key
from realign.generation.generator import Answer

NUM_SAMPLES = 3  # per kind of change and task
CHANGES = ("gained", "lost", "other")  # wrong to right, right to wrong, any other change
Answers = Mapping[str, Mapping[tuple[str, str], Answer]]  # model -> item_key of a row -> answer
Sample = dict[str, Any]


def sample_answers(tasks: Mapping[str, Task], answers: Answers) -> list[Sample]:
    """Return the first differing answers of every task that its benchmark shows, at most three of
    each change.

    Within a change, answers with marked words come first. ``change_count`` of a sample is the
    number of answers with that change in the task.
    """
    samples: list[Sample] = []
    for name, task in tasks.items():
        if not (show := task.benchmark.samples.get(name)):
            continue
        kept: dict[str, list[Sample]] = {change: [] for change in CHANGES}
        counts = dict.fromkeys(CHANGES, 0)
        for sample in _differing(task, show, answers):
            counts[sample["change"]] += 1
            if counts[sample["change"]] <= NUM_SAMPLES:
                kept[sample["change"]].append(sample)
        samples += [
            {"task": name, **sample, "change_count": counts[change]}
            for change in CHANGES
            for sample in kept[change]
        ]
    return sorted(
        samples,
        key=lambda sample: (
            CHANGES.index(sample["change"]),
            not any(view["absent_words"] for view in sample["answers"].values()),
        ),
    )


def _differing(task: Task, show: Callable[[Row, str], View], answers: Answers) -> Iterator[Sample]:
    models = list(answers)
    for row in task.rows:
        texts = {
            model: answers[model][item_key(row)].text.strip() for model in (models[0], models[-1])
        }
        shown = {model: show(row, text) for model, text in texts.items()}
        if len({*shown.values()}) > 1:
            before, after = shown[models[0]].is_right, shown[models[-1]].is_right
            change = "other" if before == after else "gained" if after else "lost"
            yield {
                "benchmark": task.benchmark.name,
                "change": change,
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
