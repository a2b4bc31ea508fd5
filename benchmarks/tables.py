"""Writes the tables of README and docs/results from ``benchmarks/results/``:
``python -m benchmarks.tables``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.head.tables import head_block
from benchmarks.retrieval.table import retrieval_block
from benchmarks.step.table import step_block

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- demo table: python -m benchmarks.tables -->", "<!-- end of demo table -->"
SUMMARY_BEGIN, SUMMARY_END = (
    "<!-- demo summary: python -m benchmarks.tables -->",
    "<!-- end of demo summary -->",
)
PAGES = (
    "README.md",
    *(f"docs/results/{name}.md" for name in ("demo", "head", "retrieval", "step")),
)
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
    lines = _demo_lines(results, ("base", *results["objectives"]), COLUMNS)
    return "\n".join([*lines, "", note])


def demo_summary(results: dict[str, Any]) -> str:
    """Return the table of the base, its two plain alternatives and the recommended objective."""
    models = ("base", "SFT", "rDPO", results["recommended"])
    lines = _demo_lines(results, models, COLUMNS[:3])
    note = f"Percent, mean of {len(results['seeds'])} seeds; lower CHAIR_i is better."
    return "\n".join([*lines, "", note])


def _demo_lines(
    results: dict[str, Any], models: Sequence[str], columns: Sequence[tuple[str, str, str]]
) -> list[str]:
    runs = list(results["seeds"].values())
    lines = [
        "| objective | " + " | ".join(name for name, _, _ in columns) + " | passes |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for model in models:
        cells = [f"{mean(runs, task, metric, model):.1f}" for _, task, metric in columns]
        passes = "" if model == "base" else f"{sum(passing(runs, model))} of {len(runs)}"
        label = f"**{model}**" if model == results["recommended"] else model
        lines.append(f"| {label} | {' | '.join(cells)} | {passes} |")
    return lines


def mean(runs: list[dict[str, Any]], task: str, metric: str, model: str) -> float:
    """Mean over seeds, in percent."""
    values = [run["scores"][task]["models"][model][metric]["value"] for run in runs]
    return 100 * sum(values) / len(values)


def passing(runs: list[dict[str, Any]], model: str) -> Iterator[bool]:
    """Return whether each seed passes."""
    return (run["verdicts"][model]["passes"] for run in runs)


def demo_block(results: Path, make: Callable[[dict[str, Any]], str] = demo_table) -> str:
    """Return the text between the marks of the demo's table."""
    path = results / "demo_seeds.json"
    if not path.is_file():
        return "*Three seeds have not been measured yet: `python -m benchmarks.demo.seeds`.*"
    return make(json.loads(path.read_text()))


BLOCKS = {
    (BEGIN, END): demo_block,
    (SUMMARY_BEGIN, SUMMARY_END): partial(demo_block, make=demo_summary),
    (RETRIEVAL_BEGIN, RETRIEVAL_END): retrieval_block,
    (HEAD_BEGIN, HEAD_END): head_block,
    (STEP_BEGIN, STEP_END): step_block,
}


def with_tables(page: str) -> str:
    """Return a page with those of its tables made anew whose marks it has."""
    for (begin, end), make in BLOCKS.items():
        if begin not in page:
            continue
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{make(ROOT / 'benchmarks' / 'results')}\n{end}{after}"
    return page


def main() -> None:
    """Rewrite the pages."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
