"""Scored answers of one model, summed over the clusters that are drawn together."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from realign.evaluation.benchmark import Array, Benchmark, Rule, ScoredRow
from realign.evaluation.rows import Row

COUNTS = ("tp", "fp", "tn", "fn")
SAID_YES = "said_yes"  # the share of answers that a rule reads as yes, a fraction under every rule


class Run(NamedTuple):
    """One run of a model, scored by one rule."""

    rule: str
    model: str
    run: str

    @property
    def label(self) -> str:
        """The name of the run in messages."""
        return f"{self.model}, run {self.run}"


class Units(NamedTuple):
    """Values of the units that a metric is the mean of, such as questions or images."""

    values: Array
    clusters: NDArray[np.int64]
    """Number of each unit's cluster."""

    @property
    def are_binary(self) -> bool:
        """True if each unit is right or wrong, so that gained and lost ones can be counted."""
        return bool(np.isin(self.values, (0, 1)).all())

    @property
    def share_clusters(self) -> bool:
        """True if a cluster has more than one unit."""
        return len(np.unique(self.clusters)) < len(self.clusters)


class Sums(NamedTuple):
    """The sums of one model under one rule."""

    vectors: dict[str, Array]
    """Score vectors by split, shape ``(clusters, K)``, zero if a split has no row of a cluster. The
    last two columns count answers and those that are read as yes.
    """
    units: dict[str, dict[str, Units]]
    """Units of each metric of each split."""


def number_clusters(
    benchmark: Benchmark, rules: Collection[Rule], rows: Sequence[Row]
) -> list[int]:
    """Return the number of each row's cluster, from 0 in the order of the rows.

    Rules may have clusters of different keys. Rows that are together under one of them are together
    here, so that one draw serves all rules.
    """
    keys = {rule.cluster or benchmark.cluster for rule in rules}
    parents: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parents.setdefault(node, node) != node:
            parents[node] = node = parents[parents[node]]
        return node

    for row in rows:
        first, *others = (root((key, row[key])) for key in sorted(keys))
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[Hashable, int] = {}
    key = min(keys)
    return [numbers.setdefault(root((key, row[key])), len(numbers)) for row in rows]


def cluster_sums(
    benchmark: Benchmark,
    rule: Rule,
    rows: Sequence[Row],
    texts: Sequence[str],
    clusters: Sequence[int],
    num_clusters: int,
) -> Sums:
    """Score the answers to some rows by a rule and sum them by split and cluster.

    Args:
        benchmark: Benchmark of the rows.
        rule: Which scores them.
        rows: To score; each has its ``splits``.
        texts: The answer to each, as the rule reads it.
        clusters: The number of each row's cluster.
        num_clusters: Number of clusters of all rows.
    """
    key = rule.cluster or benchmark.cluster
    places = {row[key]: number for row, number in zip(rows, clusters, strict=True)}
    sums, scored = split_vectors(rule, key, rows, texts, places, num_clusters)
    said_yes = {split: np.zeros((num_clusters, 2)) for split in sums}
    for row, text, number in zip(rows, texts, clusters, strict=True):
        is_yes = rule.says_yes is not None and rule.says_yes(text)
        for split in dict.fromkeys(row["splits"]):
            said_yes[split][number] += 1, is_yes
    vectors = {split: np.hstack([found, said_yes[split]]) for split, found in sums.items()}
    units = {
        split: {
            metric: _units(of_cluster, scored[split], places)
            for metric, (of_cluster, _) in rule.units.items()
        }
        for split in sums
    }
    return Sums(vectors, units)


def split_vectors(
    rule: Rule,
    key: str,
    rows: Sequence[Row],
    texts: Sequence[str],
    places: Mapping[Hashable, int],
    num_clusters: int,
) -> tuple[dict[str, Array], dict[str, dict[Hashable, list[ScoredRow]]]]:
    """Return the score vectors of all clusters by split, shape ``(clusters, K)``, zero where a
    split has none of one, and the scored rows by split and cluster.

    Args:
        rule: Which scores the rows.
        key: The key of a row that names its cluster under the rule.
        rows: To score; each has its ``splits``.
        texts: The answer to each, as the rule reads it.
        places: Cluster to its number.
        num_clusters: The number of clusters of all rows.
    """
    scored: dict[str, dict[Hashable, list[ScoredRow]]] = {}
    for row, text in zip(rows, texts, strict=True):
        scores = rule.score(row, text)
        for split in dict.fromkeys(row["splits"]):
            scored.setdefault(split, {}).setdefault(row[key], []).append((row, scores))
    vectors = {}
    for split, rows_of in sorted(scored.items(), key=lambda item: item[0] != "all"):
        parts = {cluster: np.asarray(rule.combine(found)) for cluster, found in rows_of.items()}
        vectors[split] = np.zeros((num_clusters, len(next(iter(parts.values())))))
        for cluster, vector in parts.items():
            vectors[split][places[cluster]] += vector
    return vectors, scored


def _units(of_cluster: Any, rows_of: Mapping[Any, list[ScoredRow]], places: Any) -> Units:
    values: list[float] = []
    numbers: list[int] = []
    for cluster, rows in rows_of.items():
        found = of_cluster(rows)
        values += found
        numbers += [places[cluster]] * len(found)
    return Units(np.array(values, dtype=np.float64), np.array(numbers, dtype=np.int64))


def metric_values(
    benchmark: Benchmark, rule: Rule, vectors: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """Return the metrics of every split, and of the means over splits that the benchmark has.

    Args:
        benchmark: Benchmark of the splits.
        rule: Rule of the metrics.
        vectors: Split to score vectors summed over clusters, shape ``(..., K)``, in the form of
            :class:`Sums`.
    Returns:
        Split to metric to values, shape ``(...)``; NaN or infinite where one is not defined.
    """
    values: dict[str, dict[str, Array]] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for split, sums in vectors.items():
            metrics = rule.split_metrics.get(split, rule.metrics)
            values[split] = dict(metrics(sums[..., :-2]))
            if rule.says_yes is not None:
                values[split][SAID_YES] = sums[..., -1] / sums[..., -2]
        for name, splits in benchmark.means.items():
            if len(splits) > 1 and all(split in values for split in splits):
                values[name] = {
                    metric: np.mean([values[split][metric] for split in splits], axis=0)
                    for metric in values[splits[0]]
                    if metric not in COUNTS
                }
    return values
