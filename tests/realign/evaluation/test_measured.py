"""Draws of clusters against theory, closed forms and every way to exchange two models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from realign.errors import RefusedError
from realign.evaluation.benchmark import Array, Benchmark, Rule, TableRow, of_items
from realign.evaluation.cluster_sums import Run
from realign.evaluation.comparison import comparison_of
from realign.evaluation.measured import Measured, Place
from realign.evaluation.statistics import Draws, undefined_as_nan

Rows = list[dict[str, Any]]


def mean_and_ratio(sums: Array) -> dict[str, Array]:
    return {"accuracy": sums[..., 1] / sums[..., 0], "ratio": sums[..., 1] / sums[..., 2]}


def counts(row: dict[str, Any], answer: str) -> list[int]:
    """Return the counts of an answer: one, whether it is right (r), and whether it is given."""
    return [1, "r" in answer, answer != ""]


RULE = Rule(
    counts,
    mean_and_ratio,
    units={"accuracy": of_items(lambda scores: scores[1])},
    says_yes=lambda answer: "y" in answer,
)
BENCHMARK = Benchmark(
    name="made",
    title="Made",
    layouts=[],
    rules={"plain": RULE},
    table=[],
    means={"mean": ("a", "b")},
    constants={"right": "ry"},
)
TEXTS = {"r": "r", "w": "w", "-": ""}


def made(
    models: dict[str, str | list[str]],
    clusters: Sequence[int],
    *,
    splits: str = "",
    draws: int = 2_000,
    rules: dict[str, Rule] | None = None,
) -> Measured:
    """Measure models whose answers are letters; a row is in ``all`` and a split of one letter."""
    rows = [
        {"image": cluster, "splits": ("all", *(splits[i : i + 1]))}
        for i, cluster in enumerate(clusters)
    ]
    rules = rules or {"plain": RULE}
    texts = {
        Run(rule, model, str(number)): [[TEXTS.get(letter, letter) for letter in answers]]
        for rule in rules
        for model, runs in models.items()
        for number, answers in enumerate([runs] if isinstance(runs, str) else runs, start=1)
    }
    return Measured(BENCHMARK, rows, texts, rules, Draws(draws, 3), {})


def accuracy(measured: Measured, model: str, split: str = "all") -> dict[str, Any]:
    return measured.entry("plain", model, Place(split, "accuracy"))


def test_the_interval_of_a_proportion_is_the_normal_interval() -> None:
    entry = accuracy(made({"m": "r" * 700 + "w" * 300}, range(1000)), "m")
    error = np.sqrt(0.7 * 0.3 / 1000)
    assert entry["value"] == 0.7
    assert entry["interval"] == pytest.approx([0.7 - 1.96 * error, 0.7 + 1.96 * error], abs=3e-3)
    assert entry["difference_interval"] == [0, 0]
    assert entry["bootstrap_standard_error"] == pytest.approx(error, rel=0.05)
    assert entry["standard_error"] == entry["clustered_standard_error"]
    assert entry["clustered_standard_error"] == pytest.approx(error, rel=1e-3)


def test_the_bootstrap_agrees_with_the_clustered_error() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(300), 4)
    level = rng.random(300)[clusters]  # items of a cluster are alike
    answers = "".join(np.where(rng.random(1200) < level, "r", "w"))
    entry = accuracy(made({"m": answers}, clusters.tolist()), "m")
    assert entry["clustered_standard_error"] > 1.2 * entry["standard_error"]
    assert entry["bootstrap_standard_error"] == pytest.approx(
        entry["clustered_standard_error"], rel=0.06
    )


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    base = "rw" * 500
    entry = accuracy(made({"a": base, "b": "rr" * 50 + "rw" * 450}, range(1000)), "b")
    low, high = entry["difference_interval"]
    assert entry["difference"] == pytest.approx(0.05)
    assert 0.03 < low < 0.05 < high < 0.07
    paired = entry["paired"]
    assert (paired["units"], paired["gained"], paired["lost"], paired["net"]) == (1000, 50, 0, 50)
    assert (paired["test"], paired["p"]) == ("mcnemar", 2 * 0.5**50)


def test_splits_and_models_share_their_bootstrap_draws() -> None:
    """The splits are the same questions, so their mean and each of them have one interval."""
    base, other = "rwrwwwrrwr" * 2, "rrrwwwrrww" * 2
    measured = made({"a": base, "b": other}, [*range(10)] * 2, splits="a" * 10 + "b" * 10)
    for model in ("a", "b"):
        found = [accuracy(measured, model, split) for split in ("a", "b", "mean", "all")]
        for key in ("value", "interval", "difference", "difference_interval"):
            for entry in found[1:]:
                assert entry[key] == pytest.approx(found[0][key])
    ratio = measured.entry("plain", "b", Place("mean", "ratio"))
    assert ratio["interval"] == pytest.approx(accuracy(measured, "b", "a")["interval"])


def test_the_same_seed_gives_the_same_draws() -> None:
    first, again = (accuracy(made({"m": "rwwrr"}, range(5)), "m") for _ in range(2))
    assert first == again
    weights = np.concatenate([*Draws(3_000, 1).weights(7)])
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.06)
    assert weights.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.1)  # multinomial
    assert not np.array_equal(weights, np.concatenate([*Draws(3_000, 2).weights(7)]))


def test_the_permutation_test_counts_every_exchange_of_clusters() -> None:
    clusters = [0, 0, 0, 1, 1, 2, 3, 3, 4, 5]
    base, other = "wwwwwrrwww", "rrrwrrrrww"
    gaps = np.zeros(6)
    np.add.at(gaps, clusters, [(b == "r") - (a == "r") for a, b in zip(base, other, strict=True)])
    signs = np.array([*product((1, -1), repeat=6)])
    wanted = np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()))
    entry = accuracy(made({"a": base, "b": other}, clusters, draws=20_000), "b")
    assert entry["paired"]["p_permutation"] == pytest.approx(wanted, abs=0.01)
    assert entry["paired"]["p"] == entry["paired"]["p_permutation"]
    assert entry["paired"]["test"] == "permutation"


def test_the_permutation_test_exchanges_the_counts_of_ratios() -> None:
    base, other = "r-w-rw", "rrwwr-"
    first, second = (
        np.array([counts({}, TEXTS[letter]) for letter in letters], float)
        for letters in (base, other)
    )
    found = []
    for swap in product((0, 1), repeat=6):
        moved = np.array(swap) @ (second - first)
        values = [
            mean_and_ratio(sums)["ratio"] for sums in (second.sum(0) - moved, first.sum(0) + moved)
        ]
        found.append(abs(values[0] - values[1]))
    observed = abs(mean_and_ratio(second.sum(0))["ratio"] - mean_and_ratio(first.sum(0))["ratio"])
    entry = made({"a": base, "b": other}, range(6), draws=20_000).entry(
        "plain", "b", Place("all", "ratio")
    )
    wanted = np.mean(np.array(found) >= observed - 1e-9)
    assert entry["paired"]["p_permutation"] == pytest.approx(wanted, abs=0.015)
    assert entry["paired"]["p_mcnemar"] is None


def test_equal_models_have_a_p_value_of_1() -> None:
    paired = accuracy(made({"a": "rwrw", "b": "rwrw"}, [0, 0, 1, 1]), "b")["paired"]
    assert (paired["p_mcnemar"], paired["p_permutation"]) == (1, 1)
    assert paired["minimum_detectable"] is None


def test_undefined_draws_are_omitted_and_counted() -> None:
    measured = made({"a": "r--", "b": "w--"}, range(3), draws=4_000)
    entry = measured.entry("plain", "b", Place("all", "ratio"))
    assert entry["interval"] == [0, 0]
    assert entry["undefined_draws"] == pytest.approx(4_000 * (2 / 3) ** 3, abs=120)
    assert entry["difference_undefined_draws"] == entry["undefined_draws"]
    empty = made({"a": "---", "b": "w--"}, range(3)).entry("plain", "b", Place("all", "ratio"))
    assert (empty["value"], empty["difference"], empty["paired"]) == (0, None, None)


def test_a_difference_of_infinite_values_gives_no_warning() -> None:
    rule = Rule(counts, lambda sums: {"x": sums[..., 0] / sums[..., 1]})
    with np.errstate(all="raise"):
        measured = made({"a": "rw", "b": "rw"}, range(2), rules={"plain": rule})
    entry = measured.entry("plain", "b", Place("all", "x"))
    assert entry["difference_interval"] == [0, 0]
    assert 0 < entry["undefined_draws"] < 2_000
    assert np.isnan(undefined_as_nan(np.inf))


def test_clusters_that_overlap_between_rules_are_drawn_together() -> None:
    rows = [{"image": i, "set": s, "splits": ("all",)} for i, s in enumerate("xxyyz")]
    rules = {"plain": RULE, "by set": Rule(counts, mean_and_ratio, cluster="set")}
    texts = {Run(rule, "m", "1"): [["r"] * 5] for rule in rules}
    assert Measured(BENCHMARK, rows, texts, rules, Draws(10), {}).num_clusters == 3


def test_training_runs_are_the_unit_of_a_method_comparison() -> None:
    base = ["rrwwwwwwww", "rrrwwwwwww", "rrrrwwwwww"]
    other = ["rrrrwwwwww", "rrrrwwwwww", "rrrrrrwwww"]  # 0.2, 0.1 and 0.2 more
    measured = made({"a": base, "b": other}, range(10))
    entry = accuracy(measured, "b")
    assert (entry["interval_over"], entry["value"]) == ("seeds", pytest.approx(14 / 30))
    half = 4.30265 * np.std([0.2, 0.1, 0.2], ddof=1) / np.sqrt(3)
    assert entry["difference"] == pytest.approx(0.5 / 3)
    assert entry["difference_interval"] == pytest.approx([0.5 / 3 - half, 0.5 / 3 + half], abs=1e-5)
    assert entry["paired"]["test"] == "t over seeds"
    assert entry["paired"]["p"] == pytest.approx(2 * (0.5 - 5 / (2 * np.sqrt(27))))  # t = 5, 2 df
    assert [run["interval_over"] for run in entry["runs"].values()] == ["items"] * 3
    alone = accuracy(made({"a": base[1], "b": other[1]}, range(10)), "b")
    assert {**entry["runs"]["2"], "runs": None} == alone
    one = accuracy(made({"a": base[0], "b": other}, range(10)), "b")  # each run against the base
    assert [run["difference"] for run in one["runs"].values()] == pytest.approx([0.2, 0.2, 0.4])
    with pytest.raises(RefusedError, match="must be of the same training runs for a and b"):
        made({"a": base, "b": other[:2]}, range(10))


def table_of(measured: Measured, *metrics: str) -> dict[str, Any]:
    rows = [(measured, TableRow("", "plain", metric, metric)) for metric in metrics]
    return comparison_of([measured], rows, measured.draws, [*measured.runs])


def test_a_table_is_adjusted_for_its_comparisons() -> None:
    base = "rw" * 100
    answers = {"a": base, "better": "rr" * 30 + "rw" * 70, "other": "rr" * 3 + "ww" + "rw" * 96}
    found = table_of(made(answers, range(200)), "accuracy")
    assert found["num_comparisons"] == 2
    better, other = (found["table"][0]["comparisons"][name] for name in ("better", "other"))
    assert better["p_holm"] == pytest.approx(2 * better["p"])
    assert other["p_holm"] == other["p"] == 0.625  # 3 gained, 1 lost
    assert (better["level"], other["level"]) == (pytest.approx(0.975), pytest.approx(0.95))
    assert (better["is_inside_noise"], other["is_inside_noise"]) == (False, True)
    entry = found["benchmarks"]["made"]["rules"]["plain"]["splits"]["all"]["models"]["better"]
    plain = entry["accuracy"]["difference_interval"]
    assert better["interval_holm"][0] < plain[0] < plain[1] < better["interval_holm"][1]


def test_four_gained_answers_are_not_significant_though_the_bootstrap_excludes_0() -> None:
    base = "w" * 60
    answers = {"a": base, "first": "r" * 4 + "w" * 56, "second": "r" * 4 + "w" * 56}
    found = table_of(made(answers, range(60)), "accuracy")
    tests = found["table"][0]["comparisons"]
    assert [test["p"] for test in tests.values()] == [0.125, 0.125]
    assert tests["second"]["interval_holm"][0] > 0
    assert all(test["is_inside_noise"] for test in tests.values())


def test_constant_baselines_and_the_yes_rate_accompany_scores() -> None:
    found = table_of(made({"a": "yrwy", "b": "yyyy"}, range(4)), "accuracy")
    assert found["models"] == ["a", "b"]
    split = found["benchmarks"]["made"]["rules"]["plain"]["splits"]["all"]
    assert split["constants"]["right"] == {"accuracy": 1, "ratio": 1, "said_yes": 1}
    assert split["models"]["a"]["said_yes"]["value"] == 0.5
    assert split["models"]["b"]["said_yes"]["difference"] == 0.5
