"""The page of a run's folder: scores, curves of training, and some pairs of the dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from realign.data.build_folder import read_funnel, row_lines
from realign.data.dataset import read_records
from realign.errors import RefusedError
from realign.review.dataset_page import pair_tiles
from realign.review.page import Tile, shown_pair, spread, write_page
from realign.review.plots import Axis, line_plot, rank_plot
from realign.review.score_part import score_part
from realign.runtime.files import read_jsonl

NUM_PAIRS = 8


def holds_run(folder: Path) -> bool:
    """Return whether a folder has any file of a run that the page shows."""
    return any(
        (folder / name).is_file()
        for name in ("dataset/dataset.parquet", "eval/scores.json", "scores.json", "metrics.jsonl")
    )


@dataclass(frozen=True)
class Lead:
    """The first part of a page, above the scores.

    Attributes:
        title: Heading.
        sentences: Sentences, each shown as a paragraph.
        heads: Headings of the table.
        rows: Cells of the table.
    """

    title: str
    sentences: Sequence[str]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def run_page(run: Path, out: Path, lead: Lead | None = None) -> Path:
    """Write the page and return its path.

    Args:
        run: Folder with any of ``dataset/``, ``metrics.jsonl``, ``eval/``; or of an evaluation.
        out: File to write.
        lead: First part of the page.
    Raises:
        RefusedError: The folder holds no file of a run.
    """
    if not holds_run(run):
        raise RefusedError(
            f"run {run} must hold dataset/, metrics.jsonl, eval/ or scores.json, holds none of "
            "them, and is no dataset. Give the folder of a run, a build folder or a dataset file."
        )
    page: dict[str, Any] = {"title": run.resolve().name, "tiles": [], "models": [], "lead": lead}
    page |= dict.fromkeys(
        ("score_benchmarks", "score_plot", "probes", "samples", "curves", "pairs", "funnel")
    )
    page |= {"score_note": "", "samples_model": "", "rank_plot": None}
    found = []
    if (run / "dataset" / "dataset.parquet").is_file():
        found.append("dataset")
        page |= _dataset_part(run / "dataset", page["tiles"])
    evaluation = run if (run / "scores.json").is_file() else run / "eval"
    if (evaluation / "scores.json").is_file():
        found.append("evaluation")
        page |= score_part(evaluation, page["tiles"])
    if (run / "metrics.jsonl").is_file():
        found.append("training")
        page["curves"] = _curves(read_jsonl(run / "metrics.jsonl"))
    page["subtitle"] = _subtitle(run, found)
    return write_page(out, "run.html.j2", page)


def _subtitle(run: Path, found: Sequence[str]) -> str:
    path = run / "train.json"
    if not path.is_file():
        return f"What this run holds: {', '.join(found)}."
    config = json.loads(path.read_text())["config"]
    names = ("objective", "beta", "image_weight", "nll_weight", "learning_rate", "epochs", "seed")
    return ", ".join(f"{name} {config[name]}" for name in names)


def _dataset_part(folder: Path, tiles: list[Tile]) -> dict[str, Any]:
    records = read_records(folder, None)
    part: dict[str, Any] = {"pairs": [shown_pair(record) for record in spread(records, NUM_PAIRS)]}
    if counts := read_funnel(folder):
        tiles += pair_tiles(len(records), counts)
        part["funnel"] = row_lines(counts)
        ranks = {int(rank): count for rank, count in counts["accepted_by_rank"].items()}
        part["rank_plot"] = rank_plot(ranks)
    return part


def _is_number(value: Any) -> bool:
    """Return whether a metric has a value; null, or NaN by an earlier version, is none."""
    return isinstance(value, int | float) and math.isfinite(value)


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    def series(*names: str) -> dict[str, list[tuple[float, float]]]:
        points = {
            name: [(line["step"], line[name]) for line in lines if _is_number(line.get(name))]
            for name in names
        }
        return {
            name.removeprefix("rewards/").replace("_", " "): values
            for name, values in points.items()
            if values
        }

    plots = [
        ("Loss", series("loss"), Axis("nats per pair")),
        (
            "Reward margins",
            series("rewards/text_margins", "rewards/image_margins"),
            Axis("nats, times beta", line=0.0),
        ),
        (
            "Reward accuracies",
            series("rewards/text_accuracies", "rewards/image_accuracies"),
            Axis("share of pairs", line=0.5, ends=(0.0, 1.0)),
        ),
        (
            "Rewards",
            series("rewards/chosen", "rewards/text_rejected", "rewards/image_rejected"),
            Axis("nats, times beta", line=0.0),
        ),
    ]
    return [line_plot(title, data, axis) for title, data, axis in plots if data]
