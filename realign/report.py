"""The verb ``realign report``: one static HTML page of whatever a run's folder holds."""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from realign.dataset import read_records
from realign.errors import RefusedError
from realign.eval.table import cut_note, difference, percent, score_rows
from realign.files import read_jsonl, write_text
from realign.plots import bar_plot, count_plot, line_plot
from realign.records import Record, thumbnail_png
from realign.run_folder import check_out

NUM_PAIRS = 8
THUMBNAIL_PIXELS = 264


def write_report(run: Path, out: Path) -> Path:
    """Write the page and return its path.

    Args:
        run: Folder with any of ``dataset/``, ``metrics.jsonl``, ``eval/``.
        out: The page.
    Raises:
        RefusedError: The folder holds none of them, or the page cannot be written there.
    """
    check_out(out.parent)
    if out.is_dir():
        raise RefusedError(
            f"out must be a file for the page, got the folder {out}. Add a name: {out}/report.html."
        )
    page: dict[str, Any] = {"title": run.resolve().name, "tiles": [], "models": []}
    page |= dict.fromkeys(
        ("score_rows", "score_plots", "samples", "curves", "pairs", "funnel", "rank_plot")
    )
    page |= {"score_note": "", "samples_model": ""}
    found = []
    if (run / "dataset" / "dataset.parquet").is_file():
        found.append("dataset")
        page |= _dataset_part(run / "dataset", page["tiles"])
    if (run / "eval" / "scores.json").is_file():
        found.append("evaluation")
        page |= _score_part(run / "eval", page["tiles"])
    if (run / "metrics.jsonl").is_file():
        found.append("training")
        page["curves"] = _curves(read_jsonl(run / "metrics.jsonl"))
    if not found:
        raise RefusedError(
            f"run {run} must hold dataset/, metrics.jsonl or eval/, holds none of them. Give the "
            "folder of a run."
        )
    page["subtitle"] = _subtitle(run, found)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    write_text(out, environment.get_template("report.html.j2").render(page))
    return out


def _subtitle(run: Path, found: Sequence[str]) -> str:
    path = run / "train.json"
    if not path.is_file():
        return f"What this run holds: {', '.join(found)}."
    config = json.loads(path.read_text())["config"]
    names = ("objective", "beta", "image_weight", "nll_weight", "learning_rate", "epochs", "seed")
    return ", ".join(f"{name} {config[name]}" for name in names)


def _dataset_part(folder: Path, tiles: list[dict[str, str]]) -> dict[str, Any]:
    records = read_records(folder, None)
    part: dict[str, Any] = {"pairs": [_pair(record) for record in _spread(records, NUM_PAIRS)]}
    funnel_path = folder / "funnel.json"
    if funnel_path.is_file():
        counts = json.loads(funnel_path.read_text())
        tiles.append(
            {"value": f"{counts['accepted']:,}", "label": f"pairs from {counts['rows']:,} answers"}
        )
        part["funnel"] = list(_funnel_rows(counts))
        part["rank_plot"] = count_plot(
            "Accepted pairs by rank of the retrieved image", counts["accepted_by_rank"]
        )
    return part


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """Evenly spaced, so that the sample is neither the head of the file nor anybody's choice."""
    step = max(1, len(records) // count)
    return list(records[::step][:count])


def _funnel_rows(counts: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    rows = [("in the source", counts["rows"]), ("accepted", counts["accepted"])]
    rows += [
        (f"dropped: {reason}", n)
        for reason, n in sorted(counts["dropped"].items(), key=lambda item: -item[1])
    ]
    rows += [(f"masked by {who}", n) for who, n in counts["masked_by"].items()]
    for label, count in rows:
        yield {
            "label": label,
            "count": f"{count:,}",
            "share": f"{100 * count / max(counts['rows'], 1):.1f} %",
        }


def _pair(record: Record) -> dict[str, Any]:
    chosen, rejected = word_diff(record.chosen, record.rejected)
    meta = record.meta
    facts = [f"row {record.id}"]
    if "retrieval" in meta:
        facts.append(f"rank {meta['retrieval']['rank']}, cosine {meta['retrieval']['cosine']:.3f}")
    if "similarity" in meta:
        facts.append(
            f"similarity {meta['similarity']['value']:.2f} ({meta['similarity']['model']})"
        )
    return {
        "original": _data_uri(record.images[0]) if record.images else "",
        "retrieved": _data_uri(record.rejected_images[0]) if record.rejected_images else "",
        "prompt": record.prompt[-1]["content"],
        "chosen": chosen,
        "rejected": rejected,
        "masked": meta.get("masked", ""),
        "facts": facts,
    }


def word_diff(chosen: str, rejected: str) -> tuple[Markup, Markup]:
    """Both texts as HTML with the words that differ marked."""
    a, b = re.findall(r"\s+|\w+|[^\w\s]", chosen), re.findall(r"\s+|\w+|[^\w\s]", rejected)
    left, right = Markup(), Markup()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left += _marked("".join(a[a0:a1]), "kept" if kind != "equal" else "")
        right += _marked("".join(b[b0:b1]), "lost" if kind != "equal" else "")
    return left, right


def _marked(text: str, style: str) -> Markup:
    if not style or not text.strip():
        return escape(text)
    return Markup('<mark class="{}">{}</mark>').format(style, text)


def _data_uri(raw: bytes) -> str:
    return (
        "data:image/png;base64," + base64.b64encode(thumbnail_png(raw, THUMBNAIL_PIXELS)).decode()
    )


def _score_part(folder: Path, tiles: list[dict[str, str]]) -> dict[str, Any]:
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    rows = list(score_rows(scores))
    models = list(rows[0][2])
    items = {task: values["items"] for task, values in scores["tasks"].items()}
    table = []
    for label, more_is_better, by_model in rows:
        cells = [
            {
                "value": percent(score["value"]),
                "difference": difference(score) if model != scores["baseline"] else "",
                "verdict": _verdict(score, more_is_better) if model != scores["baseline"] else "",
            }
            for model, score in by_model.items()
        ]
        table.append({"label": label, "cells": cells})
    last = models[-1]
    for label, _, by_model in rows:
        if label.startswith(("CHAIR_i", "POPE adversarial, balanced", "recall")):
            before, after = by_model[models[0]]["value"], by_model[last]["value"]
            name = label.partition(",")[0] if label.startswith("CHAIR") else label
            tiles.append(
                {
                    "value": f"{percent(before)} → {percent(after)}",
                    "label": f"{name}, {models[0]} → {last}, %",
                }
            )
    bars = [
        bar_plot(
            label,
            {model: (score["value"], *score["interval"]) for model, score in by_model.items()},
        )
        for label, _, by_model in rows
        if "F1" not in label
    ]
    note = (
        f"{', '.join(f'{task}: {count:,} items' for task, count in items.items())}. Percent; "
        f"below each value its "
        f"difference from {models[0]} in points with a 95 % interval (paired bootstrap over "
        f"images), coloured where the "
        f"interval excludes 0. {cut_note(scores)}"
    )
    return {
        "models": models,
        "score_rows": table,
        "score_plots": bars,
        "score_note": note,
        "samples": [_sample(sample, folder) for sample in scores["samples"]],
        "samples_model": last,
    }


def _verdict(score: Mapping[str, Any], more_is_better: bool) -> str:
    low, high = score["difference_interval"]
    if low <= 0 <= high:
        return ""
    return "better" if (low > 0) == more_is_better else "worse"


def _sample(sample: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    answers = []
    for model, answer in sample["answers"].items():
        absent = answer["absent_words"]
        text = Markup()
        for word in re.findall(r"\w+|\W+", answer["text"]):
            text += _marked(word, "lost" if word.lower() in absent else "")
        verdict = "chosen" if answer["is_right"] else "rejected"
        answers.append({"model": model, "text": text, "verdict": verdict})
    return {
        "picture": _data_uri((folder / "samples" / sample["picture"]).read_bytes()),
        "prompt": sample["prompt"],
        "truth": sample["truth"],
        "answers": answers,
    }


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[Markup]:
    def series(*names: str) -> dict[str, list[tuple[float, float]]]:
        points = {
            name: [(line["step"], line[name]) for line in lines if name in line] for name in names
        }
        return {
            name.removeprefix("rewards/").replace("_", " "): values
            for name, values in points.items()
            if values
        }

    plots = [
        ("Loss", series("loss"), None),
        ("Reward margins", series("rewards/text_margins", "rewards/image_margins"), 0.0),
        ("Reward accuracies", series("rewards/text_accuracies", "rewards/image_accuracies"), 0.5),
        (
            "Rewards",
            series("rewards/chosen", "rewards/text_rejected", "rewards/image_rejected"),
            0.0,
        ),
    ]
    return [line_plot(title, data, zero) for title, data, zero in plots if data]
