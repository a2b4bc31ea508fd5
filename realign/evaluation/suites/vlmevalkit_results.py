"""Results of VLMEvalKit: its own scores unchanged, and its answers, scored again if its table
identifies their questions in the published files.

<folder>/**/MODEL/T20261129-112626/MODEL_DATASET.json|tsv    answers, of the newest run
                                   MODEL_DATASET_score.csv, MODEL_DATASET_acc.csv
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.evaluation.benchmark import Record
from realign.evaluation.benchmarks.mme import question_key
from realign.evaluation.registry import find_benchmark
from realign.evaluation.rows import Row, read_table
from realign.evaluation.suites.rescoring import rescore
from realign.evaluation.suites.vlmevalkit_command import NAME, TABLES
from realign.runtime.files import finite_or_null, read_utf8, write_json
from realign.runtime.strict_json import StrictDecoder

FAILED = "Failed to obtain answer"  # how an answer begins that was not to be had
_RUN = re.compile(r"T\d{8}([-_]|$)")
_SUFFIXES = ("_score.csv", "_acc.csv")
_ANSWERS = (".json", ".tsv", ".xlsx")


class Joined(NamedTuple):
    """The keys that join a table of VLMEvalKit with the rows of a benchmark."""

    benchmark: str
    key: Callable[[Record], Hashable]
    row_key: Callable[[Row], Hashable]


def _hallusionbench_key(record: Record) -> tuple[str, ...]:
    _, _, _, *numbers = str(record["index"]).split("_")
    return str(record["category"]), str(record["l2-category"]), *numbers


JOINED = {
    "HallusionBench": Joined(
        "hallusionbench",
        _hallusionbench_key,
        lambda row: tuple(
            row[key] for key in ("category", "subcategory", "set_id", "figure_id", "question_id")
        ),
    ),
    "MME": Joined(
        "mme",
        lambda record: question_key(record["category"], record["image_path"], record["question"]),
        lambda row: row["key"],
    ),
    "MMBench_DEV_EN": Joined("mmbench", lambda record: str(record["index"]), lambda row: row["id"]),
}


class Result(NamedTuple):
    """The files of one model and data set in the newest run that has them."""

    model: str
    dataset: str
    run: str
    answers: Path | None
    scores: Path | None


def read_vlmevalkit(
    folder: Path, data: Path | None = None, *, bootstrap: int = 0
) -> dict[str, Any]:
    """Read the newest run of every model and data set.

    Args:
        folder: Folder that was written for VLMEvalKit, or any folder with its results.
        data: Folder with the published files of the benchmarks; without it no answer is scored.
        bootstrap: Number of draws for the 95 % intervals; 0 for none.
    Returns:
        The content of ``suite_scores.json``, as :func:`read_lmms_eval` returns it.
    Raises:
        RefusedError: There is no result, or one has another form or answers other questions.
    """
    models: dict[str, Any] = {}
    for result in newest_results(folder):
        entry = models.setdefault(
            result.model,
            {"runs": {}, "aggregates": [], "answers": {}, "rescored": {}, "notes": []},
        )
        entry["runs"][result.dataset] = {"run": result.run}
        if result.scores:
            entry["aggregates"] += aggregates(result.scores, result.dataset)
        else:
            entry["notes"].append(f"{result.dataset}: VLMEvalKit has not scored it.")
        if result.answers:
            _rescore(entry, result, folder, data, bootstrap)
    scores = {"schema": 1, "suite": NAME, "version": None, "models": models}
    write_json(folder / "suite_scores.json", scores)
    return scores


def newest_results(folder: Path) -> list[Result]:
    """Return the files of every model and data set, of the newest run that has some.

    Raises:
        RefusedError: There is none.
    """
    found: dict[tuple[str, str], Result] = {}
    runs = (path for path in folder.rglob("T*") if path.is_dir() and _RUN.match(path.name))
    for run in sorted(runs, key=lambda path: path.name):
        model = run.parent.name
        for dataset in TABLES:
            stem = f"{model}_{dataset}"
            answers = next(
                (run / f"{stem}{end}" for end in _ANSWERS if (run / f"{stem}{end}").is_file()), None
            )
            scores = next(
                (run / f"{stem}{end}" for end in _SUFFIXES if (run / f"{stem}{end}").is_file()),
                None,
            )
            if answers or scores:
                found[model, dataset] = Result(model, dataset, run.name, answers, scores)
    if not found:
        raise RefusedError(
            f"folder must hold MODEL/T.../MODEL_DATASET.json of VLMEvalKit, got {folder}, which "
            f"has none of {', '.join(TABLES)}. Run run.sh first, or check the folder."
        )
    return [*found.values()]


def aggregates(path: Path, dataset: str) -> list[dict[str, Any]]:
    """Return the numbers of a table of scores, one for each of its cells."""
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            split = line.pop("split", None)
            for name, text in line.items():
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    continue
                if math.isfinite(value):
                    metric = f"{name}, {split}" if split else name
                    found.append({"task": dataset, "metric": metric, "rule": NAME, "value": value})
    return found


def _rescore(
    entry: dict[str, Any], result: Result, folder: Path, data: Path | None, bootstrap: int
) -> None:
    assert result.answers is not None
    joined = JOINED.get(result.dataset)
    if joined is None or data is None:
        reason = (
            "no --data was given"
            if joined
            else "its table does not say which published question an answer is to"
        )
        entry["notes"].append(f"{result.dataset}: its answers are not scored again; {reason}.")
        return
    records = read_predictions(result.answers)
    tasks = find_benchmark(joined.benchmark).read_tasks(data)
    rows = {joined.row_key(row): row for task in tasks.values() for row in task.rows}
    answered: dict[int, tuple[Row, str]] = {}
    failed = 0
    for where, record in records:
        row = rows.get(_key(joined, record, where))
        if row is None or id(row) in answered:
            raise RefusedError(
                f"{where} must answer a question of {data} that no row before it answers, got "
                f"index {record.get('index')!r:.60}. Give the --data that was asked about."
            )
        answered[id(row)] = (row, record["prediction"])
        failed += record["prediction"].startswith(FAILED)
    if failed:
        entry["notes"].append(
            f"{result.dataset}: {failed:,} of {len(records):,} answers are missing, since "
            "VLMEvalKit failed to obtain them."
        )
    path = folder / "answers" / f"{result.model}-{joined.benchmark}.jsonl"
    entry["answers"][joined.benchmark] = str(path.relative_to(folder))
    scores, notes = rescore(joined.benchmark, [*answered.values()], data, path, bootstrap)
    entry["rescored"][joined.benchmark] = scores
    entry["notes"] += notes


def _key(joined: Joined, record: Mapping[str, Any], where: str) -> Hashable:
    try:
        return joined.key(record)
    except (KeyError, ValueError) as error:
        raise RefusedError(
            f"{where} must have the columns of VLMEvalKit's own table, got {sorted(record)} "
            f"({error}). Give the file that it wrote."
        ) from None


def read_predictions(path: Path) -> Sequence[tuple[str, dict[str, Any]]]:
    """Read a file of answers.

    Raises:
        RefusedError: It is a spreadsheet, no JSON, or a row has no index or no answer.
    """
    if path.suffix == ".xlsx":
        raise RefusedError(
            f"{path} must be JSON or tab-separated, got a spreadsheet. Run VLMEvalKit with "
            "PRED_FORMAT=json, or save the sheet as .tsv."
        )
    records: list[tuple[str, Any]] = []
    if path.suffix == ".tsv":
        records += read_table(path)
    else:
        try:
            values = finite_or_null(StrictDecoder().decode_all(read_utf8(path)))
        except json.JSONDecodeError as error:
            raise RefusedError(
                f"{path} must be JSON ({error.msg}). Run VLMEvalKit again."
            ) from None
        if not isinstance(values, list):
            raise RefusedError(f"{path} must be a list of rows, got {values!r:.60}. Run it again.")
        records += [(f"{path.name}, row {n}", value) for n, value in enumerate(values, start=1)]
    for where, record in records:
        if not isinstance(record, dict) or not isinstance(record.get("prediction"), str):
            raise RefusedError(
                f"{where} must be an object with the answer as prediction, got {record!r:.80}. Run "
                "VLMEvalKit again."
            )
    return records
