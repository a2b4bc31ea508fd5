"""Writes the README's tables from ``benchmarks/results/``: ``python -m benchmarks.tables``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.head.tables import head_block
from benchmarks.retrieval.table import retrieval_block
from benchmarks.step.table import step_block

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo table: python -m benchmarks.tables -->", "<!-- end of demo table -->"
HEAD_BEGIN, HEAD_END = (
    "<!-- head table: python -m benchmarks.tables -->",
    "<!-- end of head table -->",
)
RETRIEVAL_BEGIN, RETRIEVAL_END = (
    "<!-- retrieval table: python -m benchmarks.tables -->",
    "<!-- end of retrieval table -->",
)
STEP_BEGIN, STEP_END = (
    "<!-- step table: python -m benchmarks.tables -->",
    "<!-- end of step table -->",
)
COLUMNS = (
    ("CHAIR_i", "chair", "chair_i"),
    ("recall", "chair", "recall"),
    ("adversarial", "pope_adversarial", "balanced_accuracy"),
    ("popular", "pope_popular", "balanced_accuracy"),
    ("random", "pope_random", "balanced_accuracy"),
)


def demo_table(results: dict[str, Any]) -> str:
    """Mean over seeds, and for each criterion in how many seeds the interval excludes 0."""
    runs = list(results["seeds"].values())
    lines = [
        "| objective | " + " | ".join(name for name, _, _ in COLUMNS) + " | passes |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for model in ("base", *results["objectives"]):
        cells = [f"{mean(runs, task, metric, model):.1f}" for _, task, metric in COLUMNS]
        passes = "" if model == "base" else f"{sum(passing(runs, model))} of {len(runs)}"
        label = f"**{model}**" if model == results["recommended"] else model
        lines.append(f"| {label} | {' | '.join(cells)} | {passes} |")
    items = {task: values["items"] for task, values in runs[0]["scores"].items()}
    questions = sum(items.values()) - items["chair"]
    note = (
        f"Percent, mean of {len(runs)} seeds; lower CHAIR_i is better; the right three columns are "
        "POPE balanced accuracy. *passes*: seeds in which CHAIR_i or adversarial balanced accuracy "
        "improves on the base with a 95 % interval (paired bootstrap over images) that excludes 0, "
        f"while recall falls by less than 1 point. A seed has {items['chair']} captions and "
        f"{questions:,} questions, on scenes without the habit that the model was trained on. Made "
        f"by `{results['command']}`, torch {results['torch']}, {results['machine']}."
    )
    return "\n".join([*lines, "", note])


def mean(runs: list[dict[str, Any]], task: str, metric: str, model: str) -> float:
    """Mean over seeds, in percent."""
    values = [run["scores"][task]["models"][model][metric]["value"] for run in runs]
    return 100 * sum(values) / len(values)


def passing(runs: list[dict[str, Any]], model: str) -> Iterator[bool]:
    """Whether each seed passes."""
    return (run["verdicts"][model]["passes"] for run in runs)


def demo_block(results: Path) -> str:
    """Return what stands between the marks of the demo's table."""
    path = results / "demo_seeds.json"
    if not path.is_file():
        return "*Three seeds have not been measured yet: `python -m benchmarks.demo.seeds`.*"
    return demo_table(json.loads(path.read_text()))


BLOCKS = {
    (BEGIN, END): demo_block,
    (RETRIEVAL_BEGIN, RETRIEVAL_END): retrieval_block,
    (HEAD_BEGIN, HEAD_END): head_block,
    (STEP_BEGIN, STEP_END): step_block,
}


def with_table(readme: str) -> str:
    """The README with those of its tables made anew whose marks it has."""
    for (begin, end), make in BLOCKS.items():
        if begin not in readme:
            continue
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{make(ROOT / 'benchmarks' / 'results')}\n{end}{after}"
    return readme


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
