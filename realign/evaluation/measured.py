"""The answers of several models to one benchmark, scored by its rules and drawn together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from realign.errors import RefusedError
from realign.evaluation.benchmark import Array, Benchmark, Rule
from realign.evaluation.cluster_sums import (
    COUNTS,
    Run,
    Sums,
    Units,
    cluster_sums,
    metric_values,
    number_clusters,
)
from realign.evaluation.graded_sums import joined_sums, mean_rule, num_gradings
from realign.evaluation.rows import Row
from realign.evaluation.significance import (
    CONFIDENCE,
    detectable_difference,
    detectable_share,
    mcnemar_p,
    standard_errors,
    student_interval,
    student_p,
    student_spread,
)
from realign.evaluation.statistics import (
    Draws,
    percentile_interval,
    spread,
    undefined,
    undefined_as_nan,
)
from realign.runtime.files import finite_or_null

Entry = dict[str, Any]


class Place(NamedTuple):
    """Place of a value: its split and metric."""

    split: str
    metric: str


class Measured:
    """Scores of several models with intervals, and comparisons with the first model.

    Args:
        benchmark: Benchmark of the questions.
        rows: Questions that all models answered, each with its ``splits``.
        texts: Run of a model under a rule to its answers to the rows that the rule scores, as the
            rule reads them; one list per grading by a judge. The first model is the baseline.
        rules: Rules that score the answers.
        draws: Number of draws of clusters.
        facts: Further facts of the benchmark in files and tables, such as the version of the data.
    Raises:
        RefusedError: Training runs of two models do not pair, or their answers were not graded
            equally often.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        rows: Sequence[Row],
        texts: Mapping[Run, Sequence[Sequence[str]]],
        rules: Mapping[str, Rule],
        draws: Draws,
        facts: Mapping[str, Any],
    ) -> None:
        self.facts = facts
        self.benchmark, self.draws = benchmark, draws
        self._plain, self._gradings = (
            rules,
            num_gradings({run: len(gradings) for run, gradings in texts.items()}),
        )
        self.rules = {name: mean_rule(rule, self._gradings[name]) for name, rule in rules.items()}
        self.runs: dict[str, list[str]] = {}  # model to the names of its runs
        for run in texts:
            self.runs.setdefault(run.model, [])
            if run.run not in self.runs[run.model]:
                self.runs[run.model].append(run.run)
        self.baseline = next(iter(self.runs))
        self.pairs = {model: _pairs(self.runs, self.baseline, model) for model in self.runs}
        numbers = number_clusters(benchmark, rules.values(), rows)
        self.num_clusters = max(numbers) + 1
        self.rows = {
            name: [i for i, row in enumerate(rows) if rule.covers(row)]
            for name, rule in rules.items()
        }
        self.all_rows, self._numbers = rows, numbers
        parts = {
            run: [self._sums(run.rule, grading) for grading in gradings]
            for run, gradings in texts.items()
        }
        self.sums = {run: joined_sums(found) for run, found in parts.items()}
        self._by_grading = {
            run: [self._values(self._plain[run.rule], grading) for grading in found]
            for run, found in parts.items()
            if len(found) > 1
        }
        self.points = {
            run: self._values(self.rules[run.rule], sums) for run, sums in self.sums.items()
        }
        self._drawn = self._draw()
        self._extremes = {pair: self._swap(*pair) for pair in self._run_pairs()}

    def _sums(self, rule: str, texts: Sequence[str]) -> Sums:
        places = self.rows[rule]
        return cluster_sums(
            self.benchmark,
            self._plain[rule],
            [self.all_rows[i] for i in places],
            texts,
            [self._numbers[i] for i in places],
            self.num_clusters,
        )

    def _values(self, rule: Rule, sums: Sums) -> dict[Place, float]:
        vectors = {split: vectors.sum(axis=0) for split, vectors in sums.vectors.items()}
        return {
            place: float(undefined_as_nan(value)) for place, value in self._metrics(rule, vectors)
        }

    def _metrics(self, rule: Rule, vectors: Mapping[str, Array]) -> Iterator[tuple[Place, Array]]:
        for split, values in metric_values(self.benchmark, rule, vectors).items():
            for metric, value in values.items():
                yield Place(split, metric), value

    def _draw(self) -> dict[Run, dict[Place, Array]]:
        """Return the metrics that are not counts in every draw of the bootstrap."""
        parts: dict[Run, dict[Place, list[Array]]] = {run: {} for run in self.sums}
        for weights in self.draws.weights(self.num_clusters):
            for run, sums in self.sums.items():
                vectors = {split: weights @ found for split, found in sums.vectors.items()}
                for place, value in self._metrics(self.rules[run.rule], vectors):
                    if place.metric not in COUNTS:
                        parts[run].setdefault(place, []).append(undefined_as_nan(value))
        return {
            run: {place: np.concatenate(blocks) for place, blocks in found.items()}
            for run, found in parts.items()
        }

    def _run_pairs(self) -> Iterator[tuple[Run, Run]]:
        for rule in self.rules:
            for model, pairs in self.pairs.items():
                if model != self.baseline:
                    for own in pairs.values():
                        yield Run(rule, model, own[0]), Run(rule, self.baseline, own[1])

    def _swap(self, run: Run, base: Run) -> dict[Place, int]:
        """Return in how many permutations each difference is at least as large as observed."""
        own, other = self.sums[run].vectors, self.sums[base].vectors
        rule = self.rules[run.rule]
        gaps = {split: own[split] - other[split] for split in own}
        observed = {
            place: self.points[run][place] - self.points[base][place] for place in self.points[run]
        }
        extremes = dict.fromkeys(observed, 0)
        for swaps in self.draws.swaps(self.num_clusters):
            moved = {split: swaps @ gap for split, gap in gaps.items()}
            first = self._metrics(
                rule, {split: own[split].sum(axis=0) - moved[split] for split in own}
            )
            second = dict(
                self._metrics(
                    rule, {split: other[split].sum(axis=0) + moved[split] for split in own}
                )
            )
            for place, value in first:
                with np.errstate(invalid="ignore"):
                    found = np.abs(np.asarray(value) - np.asarray(second[place]))
                least = abs(observed[place])
                # a draw with an undefined metric counts as large, which can only increase p
                extremes[place] += int((~(found < least - 1e-9 * max(1.0, least))).sum())
        return extremes

    def places(self, rule: str) -> list[Place]:
        """Return every split and metric of a rule."""
        return [*next(points for run, points in self.points.items() if run.rule == rule)]

    def constants(self, rule: str) -> dict[str, dict[Place, float]]:
        """Return the scores of constant answers, except those that a judge would have to read."""
        chosen = self._plain[rule]
        rows = [self.all_rows[i] for i in self.rows[rule]]
        found = {}
        for name, answer in self.benchmark.constants.items():
            judging = chosen.judging
            if judging is None or not any(judging.asks_about(row, answer) for row in rows):
                found[name] = self._values(
                    chosen, self._sums(rule, [chosen.prepare(answer)] * len(rows))
                )
        return found

    def entry(self, rule: str, model: str, place: Place) -> Entry:
        """Return the entry of one metric of one model; docs/guides/evaluation.md has the keys."""
        entries = {
            label: self._own(Run(rule, model, own), place)
            | self._paired(Run(rule, model, own), Run(rule, self.baseline, base), place)
            for label, (own, base) in self.pairs[model].items()
        }
        if len(entries) == 1:
            return {**next(iter(entries.values())), "runs": None}
        over_seeds = len(self.runs[model]) > 1
        own = _over_seeds(entries) if over_seeds else next(iter(entries.values()))
        return own | self._paired_over_seeds(entries, model) | {"runs": entries}

    def difference_interval(
        self, rule: str, model: str, place: Place, entry: Entry, level: float
    ) -> list[float] | None:
        """Return the interval of an entry's difference at another level."""
        pairs = self.pairs[model]
        if len(pairs) == 1:
            ((own, base),) = pairs.values()
            draws = self._differences(Run(rule, model, own), Run(rule, self.baseline, base), place)
            return percentile_interval(draws, level)
        return student_interval([run["difference"] for run in entry["runs"].values()], level)

    @staticmethod
    def defined(value: float | None) -> float | None:
        """Return a value as files hold it; None for an undefined one."""
        return None if value is None else finite_or_null(value)

    def _own(self, run: Run, place: Place) -> Entry:
        draws = self._drawn[run].get(place, np.array([]))
        units, scale = self._units(run, place)
        naive, clustered = standard_errors(*units) if units else (None, None)
        return {
            "value": finite_or_null(self.points[run][place]),
            "interval": percentile_interval(draws, CONFIDENCE),
            "interval_over": "items",
            "undefined_draws": undefined(draws),
            "standard_error": _times(scale, naive),
            "clustered_standard_error": _times(scale, clustered),
            "bootstrap_standard_error": spread(draws),
            "gradings": self._spread_of_gradings(run, place),
        }

    def _spread_of_gradings(self, run: Run, place: Place) -> Entry | None:
        """Return the values of several gradings of the same answers, and their spread."""
        values = [finite_or_null(found[place]) for found in self._by_grading.get(run, ())]
        if not values or None in values:
            return None
        deviation = float(np.std(values, ddof=1))
        return {"values": values, "min": min(values), "max": max(values), "sd": deviation}

    def _differences(self, run: Run, base: Run, place: Place) -> Array:
        if place not in self._drawn[run]:
            return np.array([])
        return self._drawn[run][place] - self._drawn[base][place]

    def _paired(self, run: Run, base: Run, place: Place) -> Entry:
        difference = finite_or_null(self.points[run][place] - self.points[base][place])
        draws = self._differences(run, base, place)
        return {
            "difference": difference,
            "difference_interval": percentile_interval(draws, CONFIDENCE),
            "difference_undefined_draws": undefined(draws),
            "paired": None
            if run.model == self.baseline or difference is None
            else self._tests(run, base, place, draws),
        }

    def _tests(self, run: Run, base: Run, place: Place, draws: Array) -> Entry:
        (units, scale), (before, _) = self._units(run, place), self._units(base, place)
        found: Entry = dict.fromkeys(
            ("units", "gained", "lost", "net", "p_mcnemar", "clustered_standard_error")
        )
        error = spread(draws)
        found["bootstrap_standard_error"] = error
        found["p_permutation"] = (self._extremes[run, base][place] + 1) / (self.draws.number + 1)
        found["test"], found["p"] = "permutation", found["p_permutation"]
        found["minimum_detectable"] = detectable_difference(error) if error else None
        if units is None or before is None:
            return found
        gaps = units.values - before.values
        naive, clustered = standard_errors(gaps, units.clusters)
        found["units"] = len(gaps)
        found["clustered_standard_error"] = _times(scale, clustered)
        if not (units.are_binary and before.are_binary):
            return found
        gained, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
        found |= {"gained": gained, "lost": lost, "net": gained - lost}
        found["p_mcnemar"] = mcnemar_p(gained, lost)
        if not units.share_clusters:
            found["test"], found["p"] = "mcnemar", found["p_mcnemar"]
        effect = (clustered / naive) ** 2 if naive and clustered else 1.0
        found["minimum_detectable"] = _times(
            scale, detectable_share(len(gaps), gained + lost, effect)
        )
        return found

    def _units(self, run: Run, place: Place) -> tuple[Units | None, float]:
        units = self.sums[run].units.get(place.split, {}).get(place.metric)
        if units is None or not len(units.values):
            return None, 1.0
        return units, self.rules[run.rule].units[place.metric].scale

    def _paired_over_seeds(self, entries: Mapping[str, Entry], model: str) -> Entry:
        found = [entry["difference"] for entry in entries.values()]
        if None in found:
            nothing = ("difference", "difference_interval", "paired")
            return {**dict.fromkeys(nothing), "difference_undefined_draws": 0}
        if model == self.baseline:
            interval = student_interval(found)
            return {"difference": 0.0, "difference_interval": interval, "paired": None}
        p, (error, detectable) = student_p(found), student_spread(found)
        return {
            "difference": float(np.mean(found)),
            "difference_interval": student_interval(found),
            "difference_undefined_draws": 0,
            "paired": {
                "units": len(found),
                **dict.fromkeys(("gained", "lost", "net", "p_mcnemar", "p_permutation")),
                **dict.fromkeys(("clustered_standard_error", "bootstrap_standard_error")),
                "standard_error": error,
                "test": "t over seeds",
                "p": p,
                "minimum_detectable": detectable,
            },
        }


def _over_seeds(entries: Mapping[str, Entry]) -> Entry:
    """Return the mean over training runs with its t-interval; items of runs are never pooled."""
    values = [entry["value"] for entry in entries.values()]
    is_defined = None not in values
    first = next(iter(entries.values()))
    return {
        **first,
        "value": float(np.mean(values)) if is_defined else None,
        "interval": student_interval(values) if is_defined else None,
        "interval_over": "seeds",
        "undefined_draws": 0,
        "standard_error": student_spread(values)[0] if is_defined else None,
        "clustered_standard_error": None,
        "bootstrap_standard_error": None,
        "gradings": None,
    }


def _times(scale: float, value: float | None) -> float | None:
    return None if value is None else scale * value


def _pairs(
    runs: Mapping[str, Sequence[str]], baseline: str, model: str
) -> dict[str, tuple[str, str]]:
    """Return the pairs of a model's and the baseline's runs to compare, each under a name.

    Raises:
        RefusedError: Both have several runs whose names differ.
    """
    own, base = runs[model], runs[baseline]
    if model == baseline:
        return {label: (label, label) for label in own}
    if len(base) == 1:
        return {label: (label, base[0]) for label in own}
    if len(own) == 1:
        return {label: (own[0], label) for label in base}
    if {*own} != {*base}:
        raise RefusedError(
            f"answers must be of the same training runs for {baseline} and {model}, or of one run "
            f"of either, got {', '.join(base)} and {', '.join(own)}. Name the runs alike, as "
            "NAME@RUN=FILE."
        )
    return {label: (label, label) for label in own}
