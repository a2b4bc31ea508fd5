"""Comparison of models by files of their answers, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.evaluation.answer_files import Answered, named_questions, read_answers
from realign.evaluation.answer_scores import data_version
from realign.evaluation.benchmark import Benchmark, Rule, TableRow
from realign.evaluation.cluster_sums import COUNTS, SAID_YES, Run
from realign.evaluation.comparison import comparison_of, with_splits
from realign.evaluation.gradings import counted, read_gradings
from realign.evaluation.measured import Measured, Place
from realign.evaluation.registry import find_rule, read_rule_tasks
from realign.evaluation.statistics import Draws

Files = Path | str | Sequence[Path | str] | Mapping[str, Path | str | Sequence[Path | str]]
Runs = dict[str, dict[str, list[Path]]]  # model to training run to the files of its answers


def compare(
    benchmark: str,
    answers: Mapping[str, Files],
    data: Path | str,
    rule: str = "official",
    *,
    metrics: Sequence[str] = (),
    splits: Sequence[str] = (),
    allow_subset: bool = False,
    bootstrap: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare stored answers of models, or of training runs of a method, with intervals and tests.

    Args:
        benchmark: Name of the benchmark; docs/guides/evaluation.md lists all.
        answers: Model to its file of answers. A list holds the files of several training runs, and
            an object maps the name of each run to its file or to the files that it is spread over.
            The first model is the baseline; two models with several runs must name the same ones.
        data: Folder with the benchmark's published files.
        rule: Name of the rule.
        metrics: Metrics to compare; by default those that published tables print.
        splits: Splits to compare in; by default all.
        allow_subset: Whether to compare on the questions that all have answered if others are
            missing.
        bootstrap: Number of draws of the bootstrap, and of the permutation test.
        seed: Seed of the draws.
    Returns:
        The content of ``scores.json`` of ``realign eval``, without ``tasks`` and ``samples``;
        docs/guides/evaluation.md has its keys.
    Raises:
        RefusedError: A name is unknown, a file is missing or has another form, the answers are not
            those of the data, or training runs do not pair.

    Example::

        >>> from realign.evaluation import compare
        >>> found = compare("pope", {"base": "base.jsonl", "aligned": "answers.jsonl"}, "pope")
        >>> splits = found["benchmarks"]["pope"]["rules"]["official"]["splits"]
        >>> splits["random"]["models"]["aligned"]["accuracy"]["difference"]
        0.25
    """
    chosen, by = find_rule(benchmark, rule)
    if bootstrap < 1:
        raise RefusedError(f"bootstrap must be at least 1, got {bootstrap}. Pass 10000 or more.")
    if seed < 0:
        raise RefusedError(f"seed must be at least 0, got {seed}. Pass another.")
    draws = Draws(bootstrap, seed)
    measured = _measure(chosen, rule, by, _runs(answers), Path(data), draws, allow_subset)
    table = [(measured, row) for row in _table(measured, rule, metrics, splits)]
    return comparison_of([measured], table, draws, [*answers])


def named_files(options: Sequence[str]) -> Runs:
    """Return the files that options of the form ``NAME=FILE`` or ``NAME@RUN=FILE`` name.

    The same name with another file is another training run, as is the same name with another run. A
    run that is given again is spread over several files.

    Raises:
        RefusedError: An option has another form, or a name is given both ways.
    """
    runs: Runs = {}
    named: dict[str, bool] = {}
    for option in options:
        name, separator, file = option.partition("=")
        model, has_run, run = name.partition("@")
        if not (separator and model and file and (run or not has_run)):
            raise RefusedError(
                f"answers must be NAME=FILE or NAME@RUN=FILE, got {option!r}. Name the model."
            )
        found = runs.setdefault(model, {})
        if named.setdefault(model, bool(run)) != bool(run):
            raise RefusedError(
                f"answers of {model} must all be {model}=FILE or all {model}@RUN=FILE, got both. "
                "Name the run of each."
            )
        found.setdefault(run or str(len(found) + 1), []).append(Path(file))
    return runs


def _runs(answers: Mapping[str, Files]) -> Runs:
    if not answers:
        raise RefusedError("answers must name at least one model, got none. Pass NAME=FILE.")
    runs: Runs = {}
    for model, files in answers.items():
        if isinstance(files, (str, Path)):
            files = [files]
        if not isinstance(files, Mapping):
            files = {str(number): file for number, file in enumerate(files, start=1)}
        runs[model] = {
            str(run): [Path(parts)]
            if isinstance(parts, (str, Path))
            else [Path(part) for part in parts]
            for run, parts in files.items()
        }
        if not runs[model] or not all(runs[model].values()):
            raise RefusedError(f"answers of {model} must name a file, got none. Pass NAME=FILE.")
    return runs


def _measure(
    benchmark: Benchmark,
    name: str,
    rule: Rule,
    runs: Runs,
    data: Path,
    draws: Draws,
    allow_subset: bool,
) -> Measured:
    all_paths = [path for by_run in runs.values() for paths in by_run.values() for path in paths]
    named = partial(named_questions, benchmark, all_paths)
    found_tasks = read_rule_tasks(benchmark, name, data, named)
    tasks = {task: found.rows for task, found in found_tasks.items()}
    readings: dict[Run, list[dict[int, str]]] = {}  # of each grading, by id() of a row
    ungraded: list[Run] = []
    for model, by_run in runs.items():
        _check_files(model, by_run)
        found: dict[str, list[Answered]] = {}
        for run, paths in by_run.items():
            found[run] = read_answers(
                benchmark, paths, tasks, covers=rule.covers, allows_subset=allow_subset
            )
            key = Run(name, model, run)
            if _is_graded(rule, found[run]):
                readings[key] = _readings(benchmark, rule, found[run], model)
            else:
                readings[key] = [{id(item.row): rule.prepare(item.answer) for item in found[run]}]
                ungraded.append(key)
        _check_answers(model, found)
    number = max(map(len, readings.values()))
    for key in ungraded:  # no judge reads these answers, so all gradings are the same
        readings[key] *= number
    shared = {
        task: [row for row in rows if all(id(row) in texts[0] for texts in readings.values())]
        for task, rows in tasks.items()
    }
    rows = [row for rows in shared.values() for row in rows]
    total = sum(rule.covers(row) for rows in tasks.values() for row in rows)
    if not rows:
        raise RefusedError(
            f"answers must have a question in common that the rule {name} scores, got none. Give "
            "answers to the same data, or name another --rule."
        )
    texts = {
        run: [[grading[id(row)] for row in rows] for grading in gradings]
        for run, gradings in readings.items()
    }
    facts = {
        "version": data_version(benchmark, tasks),
        "subset": f"{len(rows)} of {total}" if len(rows) < total else None,
    }
    return Measured(benchmark, with_splits(benchmark, shared), texts, {name: rule}, draws, facts)


def _check_files(model: str, by_run: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a file that is given for two training runs of a model."""
    run_of: dict[Path, str] = {}
    for run, paths in by_run.items():
        for path in paths:
            other = run_of.setdefault(path.resolve(), run)
            if other != run:
                raise RefusedError(
                    f"answers of {model} must be other files for every training run, got {path} "
                    f"for the runs {other} and {run}. Name it once."
                )


def _check_answers(model: str, by_run: Mapping[str, Sequence[Answered]]) -> None:
    """Refuse runs of a model that are gradings of the same answers by a judge.

    Files that hold a judge's replies alone do not show it, since they hold no answer.
    """
    for (run, found), (other, others) in combinations(by_run.items(), 2):
        answers = {id(item.row): item.answer for item in others}
        pairs = [(item.answer, answers.get(id(item.row))) for item in found]
        shared = [pair for pair in pairs if pair[1] is not None]
        is_judged = any(item.replies for item in (*found, *others))
        has_answers = any(answer for answer, _ in shared)
        if is_judged and has_answers and all(answer == again for answer, again in shared):
            raise RefusedError(
                f"answers of {model} must differ between training runs, got the same ones for the "
                f"runs {run} and {other}, with a judge's replies. If the files are gradings of the "
                f"same answers, give them the same name and run, as {model}@{run}=FILE."
            )


def _is_graded(rule: Rule, answered: Sequence[Answered]) -> bool:
    """Return whether a judge has to read one of some answers."""
    judging = rule.judging
    return judging is not None and any(
        judging.asks_about(item.row, rule.prepare(item.answer)) for item in answered
    )


def _readings(
    benchmark: Benchmark, rule: Rule, answered: Sequence[Answered], model: str
) -> list[dict[int, str]]:
    """Return the text that a rule reads of each answer in each grading, by id() of its row.

    Raises:
        RefusedError: A judge has given no verdict on an answer.
    """
    gradings = read_gradings(benchmark, rule, answered)
    unjudged = counted(grading.unjudged for grading in gradings)
    if unjudged["items"]:
        raise RefusedError(
            f"answers of {model} must all have a verdict, {unjudged['items']:,} have none, first "
            f"for question {unjudged['ids'][0]}. Have them judged again with `realign eval judge`."
        )
    return [{id(row): verdict for row, verdict in grading.worst} for grading in gradings]


def _table(
    measured: Measured, rule: str, metrics: Sequence[str], splits: Sequence[str]
) -> list[TableRow]:
    """Return the rows to compare: the named ones, or those that published tables have."""
    benchmark = measured.benchmark
    places = [place for place in measured.places(rule) if place.metric != SAID_YES]
    _check_known("metric", metrics, [place.metric for place in places])
    _check_known("split", splits, [place.split for place in places])
    has_headline = {place.metric for place in places} & {*benchmark.headline}

    def is_shown(place: Place) -> bool:
        if metrics:
            is_metric = place.metric in metrics
        elif has_headline:
            is_metric = place.metric in benchmark.headline
        else:
            is_metric = place.metric not in COUNTS
        # a mean over splits stands for all of them
        return is_metric and (place.split in splits if splits else not _is_pooled(measured, place))

    if not (shown := [place for place in places if is_shown(place)]):
        names = ", ".join(metrics or benchmark.headline)
        inside = ", ".join(splits)
        available = "; ".join(
            f"{split}: {', '.join(place.metric for place in places if place.split == split)}"
            for split in dict.fromkeys(place.split for place in places)
            if not splits or split in splits
        )
        raise RefusedError(
            f"metric must be one that the split has ({available}), got {names} in "
            f"{inside or 'all that are compared'}. Name another --metric or --split."
        )
    scale = 100 if measured.rules[rule].unit == "fraction" else 1
    return [
        TableRow(
            "",
            rule,
            place.metric,
            f"{place.split}, {place.metric}",
            more_is_better=place.metric not in benchmark.less_is_better,
            scale=scale,
            split=place.split,
        )
        for place in shown
    ]


def _is_pooled(measured: Measured, place: Place) -> bool:
    splits = {found.split for found in measured.points[next(iter(measured.points))]}
    return place.split == "all" and not splits.isdisjoint(measured.benchmark.means)


def _check_known(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise RefusedError(
            f"{kind} must be one of {', '.join(dict.fromkeys(known))}, got {unknown[0]!r}. Name "
            "one of them."
        )
