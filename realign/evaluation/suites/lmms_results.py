"""Read results of lmms-eval: its aggregates, unchanged, and its answers, scored again under all
rules of this project.

<folder>/**/*_results.json, *_samples_TASK.jsonl    from lmms-eval; the newest run of every task
<folder>/suite.json                                 from `write_lmms_eval`, if it wrote the command
<folder>/answers/MODEL-BENCHMARK.jsonl              written: the answers in this project's format
<folder>/suite_scores.json                          written: aggregates and scores
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from realign.errors import RefusedError
from realign.evaluation.registry import find_benchmark
from realign.evaluation.rows import Row
from realign.evaluation.suites.lmms_command import MANIFEST, NAME
from realign.evaluation.suites.lmms_samples import join, read_samples
from realign.evaluation.suites.lmms_tasks import TASKS, LmmsTask, task_named
from realign.evaluation.suites.rescoring import check_files, rescore
from realign.runtime.files import finite_or_null, read_utf8, write_json
from realign.runtime.strict_json import StrictDecoder, read_json

SCORES = "suite_scores.json"
SINGAPORE = timezone(timedelta(hours=8))  # default time zone of lmms-eval's time stamps
_DERIVED = re.compile(r"_stderr(_clt|_clustered)?$")
_PAIRED = re.compile(r"paired_")
_AGREE = 1e-6


@dataclass(frozen=True)
class Run:
    """One run of lmms-eval on one task."""

    model: str
    task: str
    time: datetime
    results: Path
    content: Mapping[str, Any]

    @property
    def samples(self) -> Path:
        """File of the answers of the run."""
        stamp = self.results.name.removesuffix("_results.json")
        return self.results.with_name(f"{stamp}_samples_{self.task}.jsonl")


def read_lmms_eval(
    folder: Path, data: Path | None = None, *, allow_subset: bool = False, bootstrap: int = 0
) -> dict[str, Any]:
    """Read the newest run of every model and task, and score its answers again.

    Args:
        folder: Folder that was written for lmms-eval, or any folder with its results.
        data: Folder with the published files of the benchmarks; by default the one from which the
            command was written.
        allow_subset: Whether to read runs that asked only some questions, as with ``--limit``.
        bootstrap: Number of draws for the 95 % intervals; 0 for none.
    Returns:
        The content of ``suite_scores.json``. Each of its ``models`` has the ``aggregates`` of
        lmms-eval (rule ``lmms-eval``) and ``rescored``, which maps benchmark to rule to the result
        of :func:`realign.evaluation.score`.
    Raises:
        RefusedError: There is no result, a run asked only some questions, its answers are not those
            to the data, or the data changed since the command was written.
    """
    manifest = _manifest(folder)
    runs = newest_runs(folder)
    if data is None and manifest:
        data = Path(manifest["data"])
    if data is not None:
        files = [asked["files"] for asked in (manifest or {}).get("tasks", {}).values()]
        check_files(data, {name: digest for each in files for name, digest in each.items()})
    for run in runs:
        _check_is_full(run, allow_subset=allow_subset)
    models: dict[str, Any] = {}
    names = [*(manifest or {}).get("models", {}), *(run.model for run in runs)]
    for model in dict.fromkeys(names):
        own = [run for run in runs if run.model == model]
        if not own:
            raise RefusedError(
                f"{folder} must hold results of model {model}, for which a command was written, "
                "got none. Run run.sh there to its end."
            )
        models[model] = {
            "runs": {run.task: _origin(run, folder) for run in own},
            "aggregates": [entry for run in own for entry in aggregates(run)],
            "answers": {},
            "rescored": {},
            "notes": [],
        }
        if data is None:
            models[model]["notes"].append("No answers were scored again, since no data was given.")
            continue
        _rescore(models[model], model, own, folder, data, bootstrap, allow_subset=allow_subset)
    found = {"schema": 1, "suite": NAME, "version": (manifest or {}).get("version")}
    scores = {**found, "models": models}
    write_json(folder / SCORES, scores)
    return scores


def _manifest(folder: Path) -> Mapping[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("suite") != NAME:
        raise RefusedError(
            f"{path} must be that of a command for {NAME}, got another. Check the folder."
        )
    return manifest


def newest_runs(folder: Path) -> list[Run]:
    """Return the newest run of every model and task below a folder.

    Raises:
        RefusedError: There is no run, or a file is not a result of lmms-eval.
    """
    newest: dict[tuple[str, str], Run] = {}
    for path in sorted(folder.rglob("*_results.json")):
        content = _json(path)
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise RefusedError(
                f"{path} must be a result of lmms-eval with an object as results, got "
                f"{content!r:.60}. Remove the file."
            )
        for task in content["results"]:
            if content.get("group_subtasks", {}).get(task):
                continue  # a group, which sums up other tasks
            run = Run(_model(path, content, folder), task, _time(path, content), path, content)
            known = newest.get((run.model, task))
            if known is None or run.time > known.time:
                newest[run.model, task] = run
            elif run.time == known.time:
                raise RefusedError(
                    f"{path} must have a time of its own, got that of {known.results}. Remove the "
                    "one that does not count."
                )
    if not newest:
        raise RefusedError(
            f"folder must hold *_results.json of lmms-eval, got {folder}, which has none. Run "
            "run.sh first, or check the folder."
        )
    return [*newest.values()]


def _json(path: Path) -> Any:
    # lmms-eval writes undefined values as NaN, which is not JSON
    try:
        return finite_or_null(StrictDecoder().decode_all(read_utf8(path)))
    except json.JSONDecodeError as error:
        raise RefusedError(f"{path} must be JSON ({error.msg}). Run lmms-eval again.") from None


def _model(path: Path, content: Mapping[str, Any], folder: Path) -> str:
    """Return the model's name in the command of `write_lmms_eval`, or else its folder's name."""
    parts = path.relative_to(folder).parts
    if parts[0] == "results" and len(parts) > 2:
        return parts[1]
    return str(content.get("model_name_sanitized") or path.parent.name)


def _time(path: Path, content: Mapping[str, Any]) -> datetime:
    """Return when a run began; its time zone is read from the results, not from the stamp."""
    stamp = path.name.removesuffix("_results.json")
    arguments = content.get("config", {}).get("resolved_cli_args") or {}
    name = arguments.get("timezone")
    zone: tzinfo = SINGAPORE
    try:
        if isinstance(name, str) and name != "Asia/Singapore":
            zone = UTC if name == "UTC" else ZoneInfo(name)
        return datetime.strptime(stamp, "%Y%m%d_%H%M%S").replace(tzinfo=zone)
    except (ValueError, KeyError) as error:  # ZoneInfo raises a KeyError
        raise RefusedError(
            f"{path} must begin with a time stamp (20261129_112626) in a known time zone, got "
            f"{stamp} in {name or 'Asia/Singapore'} ({error}). Give the file the name that "
            "lmms-eval gave it."
        ) from None


def _check_is_full(run: Run, *, allow_subset: bool) -> None:
    counts = run.content.get("n-samples", {}).get(run.task)
    if not isinstance(counts, dict) or not {"original", "effective"} <= counts.keys():
        raise RefusedError(
            f"{run.results} must say how many questions of {run.task} were asked (n-samples), got "
            f"{counts!r:.40}. Run lmms-eval 0.7 again."
        )
    if counts["effective"] < counts["original"] and not allow_subset:
        raise RefusedError(
            f"{run.results} must be of a full run, got {counts['effective']:,} of "
            f"{counts['original']:,} questions of {run.task}, as with --limit. Run it without, or "
            "pass --allow-subset to read a part."
        )


def _origin(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "file": str(run.results.relative_to(folder)),
        "time": run.time.astimezone(UTC).isoformat(),
        **run.content["n-samples"][run.task],
    }


def aggregates(run: Run) -> list[dict[str, Any]]:
    """Return the metrics of a run that are numbers, with their standard errors if those are too.

    In the file of lmms-eval, a metric that is not aggregated is ``[]``, and a standard error that
    is not computed is ``"N/A"``.
    """
    values = run.content["results"][run.task]
    if not isinstance(values, dict):
        raise RefusedError(f"{run.results}: results of {run.task} must be an object. Run it again.")
    found = []
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or not _is_number(value) or _DERIVED.search(metric) or _PAIRED.match(metric):
            continue
        errors = {
            kind: error
            for kind in ("stderr", "stderr_clustered")
            if _is_number(error := values.get(f"{metric}_{kind},{name}"))
        }
        found.append(
            {"task": run.task, "metric": metric, "filter": name, "rule": NAME, "value": value}
            | errors
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rescore(
    model: dict[str, Any],
    name: str,
    runs: Sequence[Run],
    folder: Path,
    data: Path,
    bootstrap: int,
    *,
    allow_subset: bool,
) -> None:
    """Score the answers of one model under all rules, and add the scores to the model's entry."""
    found = {known: run for run in runs if (known := task_named(run.task)) is not None}
    by_task = {task: found[task] for task in TASKS if task in found}
    model["notes"] += [
        f"{run.task}: its answers are not scored again, since this project does not read its data."
        for run in runs
        if run not in by_task.values()
    ]
    present = {task.name for task in by_task}
    for benchmark in dict.fromkeys(task.benchmark for task in TASKS if task in by_task):
        rows_of = {
            task: read.rows for task, read in find_benchmark(benchmark).read_tasks(data).items()
        }
        answered: list[tuple[Row, str]] = []
        for task, run in by_task.items():
            if task.benchmark != benchmark or task.part_of in present:
                continue
            if not run.samples.is_file():
                model["notes"].append(
                    f"{run.task}: {run.samples.name} is missing, so that its answers are not "
                    "scored again. Run lmms-eval with --log_samples."
                )
                continue
            pairs = join(
                read_samples(run.samples), task, rows_of, run.samples, allow_subset=allow_subset
            )
            answered += [(row, text) for row, text, _ in pairs]
            if failed := sum(has_failed for _, _, has_failed in pairs):
                model["notes"].append(
                    f"{run.task}: {failed:,} of {len(pairs):,} answers are empty and have no count "
                    "of tokens, which is what lmms-eval writes where generation fails. Its log "
                    "names the errors."
                )
        if answered:
            path = folder / "answers" / f"{name}-{benchmark}.jsonl"
            model["answers"][benchmark] = str(path.relative_to(folder))
            scores, notes = rescore(benchmark, answered, data, path, bootstrap)
            model["rescored"][benchmark] = scores
            model["notes"] += [*notes, *_compared(model["aggregates"], by_task, scores)]


def _compared(
    aggregates_: Sequence[Mapping[str, Any]],
    by_task: Mapping[LmmsTask, Run],
    scores: Mapping[str, Any],
) -> list[str]:
    """Return the metrics for which lmms-eval's number differs from this project's."""
    notes = []
    for task, run in by_task.items():
        for entry in aggregates_:
            split, metric = task.metrics.get(entry["metric"], ("", ""))
            values = scores.get(NAME, {}).get("splits", {}).get(split, {})
            ours = values.get(metric)
            if entry["task"] != run.task or ours is None:
                continue
            if abs(entry["value"] - ours) > _AGREE:
                notes.append(
                    f"{run.task}: {entry['metric']} of lmms-eval is {entry['value']:.6f}, "
                    f"{ours:.6f} by this project's rule {NAME}."
                )
    return notes
